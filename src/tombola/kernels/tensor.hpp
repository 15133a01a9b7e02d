// The only way by which memory of Python's reaches the kernels: tensors, each checked before its address is taken.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace tombola {

namespace nb = nanobind;

// What is looked up in PyTorch once, and the names of a tensor's attributes. All live until the process ends.
struct Torch {
    PyObject *tensor, *float32, *int64, *uint8, *boolean;
    PyObject *dtype, *is_cpu, *shape, *stride, *is_contiguous, *data_ptr;

    Torch() {
        const nb::module_ torch = nb::module_::import_("torch");
        const auto attribute = [&](const char* name) { return nb::object(torch.attr(name)).release().ptr(); };
        tensor = attribute("Tensor"), float32 = attribute("float32"), int64 = attribute("int64");
        uint8 = attribute("uint8"), boolean = attribute("bool");
        dtype = PyUnicode_InternFromString("dtype"), is_cpu = PyUnicode_InternFromString("is_cpu");
        shape = PyUnicode_InternFromString("shape"), stride = PyUnicode_InternFromString("stride");
        is_contiguous = PyUnicode_InternFromString("is_contiguous");
        data_ptr = PyUnicode_InternFromString("data_ptr");
    }
};

inline const Torch*& torch() {
    static const Torch* names = nullptr;  // set when the module is loaded
    return names;
}

// Numbers of a tensor's dimensions: its sizes or its strides.
struct Numbers {
    static constexpr int most = 4;
    int count;  // of dimensions, of which `most` at most are listed
    ptrdiff_t at[most];
};

constexpr ptrdiff_t any = -1;  // a size that is not given in advance

inline std::string text(std::initializer_list<ptrdiff_t> shape) {
    std::string all = "(";
    for (const ptrdiff_t size : shape)
        all += (all.size() > 1 ? ", " : "") + (size == any ? "any" : std::to_string(size));
    return all + (shape.size() == 1 ? ",)" : ")");
}

// A tensor of numbers of type T in the CPU's memory; its shape, layout and address are checked as they are asked for.
template <class T>
class Tensor {
  public:
    // `name` is what an error calls it.
    Tensor(const char* name, nb::handle object) : name_(name), object_(object) {
        if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(torch()->tensor)))
            throw nb::type_error((std::string(name) + ": expected a tensor, got " +
                                  nb::cast<std::string>(nb::handle(object.type()).attr("__name__")))
                                     .c_str());
        if (get(torch()->dtype).ptr() != dtype() || !get(torch()->is_cpu).is(Py_True))
            refuse("");
    }

    // The address of a contiguous tensor.
    T* contiguous(std::initializer_list<ptrdiff_t> shape) const {
        if (!fits(sizes(), shape) || !call(torch()->is_contiguous).is(Py_True)) refuse(", contiguous, of shape " + text(shape));
        return address();
    }

    // The address of a tensor of which the first dimension varies fastest, then the last, and the second slowest.
    T* batch_fastest(std::initializer_list<ptrdiff_t> shape) const {
        bool fitting = fits(sizes(), shape);
        if (fitting) {
            const Numbers step = strides();
            const ptrdiff_t* size = shape.begin();
            ptrdiff_t expected = 1;
            for (int i = 0; i < step.count; ++i) {
                const int axis = i ? step.count - i : 0;
                fitting &= size[axis] <= 1 || step.at[axis] == expected;
                expected *= size[axis];
            }
        }
        if (!fitting) refuse(", its first dimension varying fastest, of shape " + text(shape));
        return address();
    }

    struct Strided {
        T* data;
        Numbers size, step;
    };

    // A tensor of any strides.
    Strided strided(std::initializer_list<ptrdiff_t> shape) const {
        const Numbers size = sizes();
        if (!fits(size, shape)) refuse(", of shape " + text(shape));
        return {address(), size, strides()};
    }

    Numbers sizes() const { return numbers(get(torch()->shape)); }

    [[noreturn]] void refuse(const std::string& expected) const {
        const auto shown = [](nb::object value) { return std::string(nb::str(value).c_str()); };
        throw std::invalid_argument(
            std::string(name_) + ": expected a tensor of " + dtype_name() + " on the CPU" + expected + ", got " +
            shown(get(torch()->dtype)) + " of shape " + shown(nb::tuple(get(torch()->shape))) + " with strides " +
            shown(call(torch()->stride)) + " on " + shown(object_.attr("device")));
    }

  private:
    Numbers strides() const { return numbers(call(torch()->stride)); }

    static PyObject* dtype() {
        if constexpr (std::is_same_v<T, float>) return torch()->float32;
        if constexpr (std::is_same_v<T, const int64_t>) return torch()->int64;
        if constexpr (std::is_same_v<T, const uint8_t>) return torch()->uint8;
        if constexpr (std::is_same_v<T, const bool>) return torch()->boolean;
    }

    static std::string dtype_name() { return nb::cast<std::string>(nb::str(nb::handle(dtype()))).substr(6); }

    nb::object get(PyObject* attribute) const {
        PyObject* value = PyObject_GetAttr(object_.ptr(), attribute);
        if (!value) throw nb::python_error();
        return nb::steal(value);
    }

    nb::object call(PyObject* method) const {
        PyObject* value = PyObject_CallMethodNoArgs(object_.ptr(), method);
        if (!value) throw nb::python_error();
        return nb::steal(value);
    }

    static Numbers numbers(const nb::object& values) {
        if (!PyTuple_Check(values.ptr())) throw nb::type_error("expected a tensor whose shape is a tuple");
        Numbers all{static_cast<int>(PyTuple_GET_SIZE(values.ptr())), {}};
        for (int i = 0; i < std::min(all.count, Numbers::most); ++i) {
            all.at[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(values.ptr(), i));
            if (all.at[i] == -1 && PyErr_Occurred()) throw nb::python_error();
        }
        return all;
    }

    static bool fits(const Numbers& size, std::initializer_list<ptrdiff_t> shape) {
        return size.count == static_cast<int>(shape.size()) &&
               std::equal(shape.begin(), shape.end(), size.at,
                          [](ptrdiff_t expected, ptrdiff_t own) { return expected == own || expected == any; });
    }

    T* address() const {
        const nb::object value = call(torch()->data_ptr);
        void* const data = PyLong_AsVoidPtr(value.ptr());
        if (!data && PyErr_Occurred()) throw nb::python_error();
        if (!data && !empty()) refuse(", with memory");
        return static_cast<T*>(data);
    }

    bool empty() const {
        const Numbers own = sizes();
        return std::any_of(own.at, own.at + own.count, [](ptrdiff_t size) { return size == 0; });
    }

    const char* name_;
    nb::handle object_;
};

}  // namespace tombola
