// The only way by which memory of Python's reaches the kernels: tensors, each checked before its address is taken.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef Py_LIMITED_API  // the stable interface has only the forms that check what they are given
#define PyTuple_GET_SIZE PyTuple_Size
#define PyTuple_GET_ITEM PyTuple_GetItem
#define PyObject_CallMethodNoArgs(object, name) PyObject_CallMethodObjArgs(object, name, nullptr)
#endif

namespace tombola {

namespace nb = nanobind;

// What is looked up in PyTorch once, and the names of a tensor's attributes. All live until the process ends.
struct Torch {
    PyObject *tensor, *parameter, *float32, *int64, *uint8, *boolean;
    PyObject *dtype, *is_cpu, *is_neg, *shape, *stride, *is_contiguous, *data_ptr;
    PyObject *storage_offset, *untyped_storage, *nbytes;

    Torch() {
        const nb::module_ torch = nb::module_::import_("torch");
        const auto attribute = [&](const char* name) { return nb::object(torch.attr(name)).release().ptr(); };
        tensor = attribute("Tensor");
        parameter = nb::object(torch.attr("nn").attr("Parameter")).release().ptr();
        float32 = attribute("float32"), int64 = attribute("int64");
        uint8 = attribute("uint8"), boolean = attribute("bool");
        dtype = PyUnicode_InternFromString("dtype"), is_cpu = PyUnicode_InternFromString("is_cpu");
        is_neg = PyUnicode_InternFromString("is_neg");
        shape = PyUnicode_InternFromString("shape"), stride = PyUnicode_InternFromString("stride");
        is_contiguous = PyUnicode_InternFromString("is_contiguous");
        data_ptr = PyUnicode_InternFromString("data_ptr");
        storage_offset = PyUnicode_InternFromString("storage_offset");
        untyped_storage = PyUnicode_InternFromString("untyped_storage");
        nbytes = PyUnicode_InternFromString("nbytes");
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
    // `name` is what an error calls it. A subclass may say of its memory what it likes, so it is no tensor here.
    Tensor(const char* name, nb::handle object) : name_(name), object_(object) {
        const PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
        if (type != torch()->tensor && type != torch()->parameter)
            throw nb::type_error((std::string(name) + ": expected a plain tensor, got " +
                                  nb::cast<std::string>(nb::handle(object.type()).attr("__name__")))
                                     .c_str());
        if (get(torch()->dtype).ptr() != dtype() || !get(torch()->is_cpu).is(Py_True))
            refuse("");
    }

    // The address of a contiguous tensor. Of floats, a network's many weights and their gradients, the storage's size
    // and the sign are not looked up: that took a tenth of the time of a small network's step. `can_compute` looks at
    // the weights' signs.
    T* contiguous(std::initializer_list<ptrdiff_t> shape) const {
        const Numbers size = sizes();
        if (!fits(size, shape) || !call(torch()->is_contiguous).is(Py_True))
            refuse(", contiguous, of shape " + text(shape));
        return address(product(size), !std::is_same_v<T, float>);
    }

    // The address of a tensor of which the first dimension varies fastest, then the last, and the second slowest.
    T* batch_fastest(std::initializer_list<ptrdiff_t> shape) const {
        const Numbers own = sizes();
        bool fitting = fits(own, shape);
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
        return address(product(own), true);
    }

    struct Strided {
        T* data;
        Numbers size, step;
    };

    // A tensor of any strides; `check` as in `address`.
    Strided strided(std::initializer_list<ptrdiff_t> shape, bool check = true) const {
        const Numbers size = sizes();
        if (!fits(size, shape)) refuse(", of shape " + text(shape));
        const Numbers step = strides();
        ptrdiff_t span = 1;  // from the first element to the last
        for (int i = 0; i < size.count; ++i) span += (size.at[i] - 1) * step.at[i];
        const bool empty = std::count(size.at, size.at + size.count, 0) > 0;
        return {address(empty ? 0 : span, check), size, step};
    }

    Numbers sizes() const { return numbers(get(torch()->shape)); }

    ptrdiff_t count() const {
        const Numbers size = sizes();
        if (size.count > Numbers::most) refuse(", of at most " + std::to_string(Numbers::most) + " dimensions");
        return product(size);
    }

    // The address of a contiguous tensor of any shape, of so many elements.
    T* all(ptrdiff_t expected) const {
        const ptrdiff_t found = count();
        if ((expected != any && found != expected) || !call(torch()->is_contiguous).is(Py_True))
            refuse(", contiguous" + (expected == any ? "" : ", of " + std::to_string(expected) + " elements"));
        return address(found, true);
    }

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
        for (int i = 0; i < std::min(all.count, Numbers::most); ++i)
            all.at[i] = number(PyTuple_GET_ITEM(values.ptr(), i));
        return all;
    }

    static bool fits(const Numbers& size, std::initializer_list<ptrdiff_t> shape) {
        return size.count == static_cast<int>(shape.size()) &&
               std::equal(shape.begin(), shape.end(), size.at,
                          [](ptrdiff_t expected, ptrdiff_t own) { return expected == own || expected == any; });
    }

    static ptrdiff_t product(const Numbers& size) {
        ptrdiff_t all = 1;
        for (int i = 0; i < size.count; ++i) all *= size.at[i];
        return all;
    }

    // The address of so many elements, counted with the gaps between them; `check`: whether memory holds all of them,
    // with their signs.
    T* address(ptrdiff_t elements, bool check) const {
        if (check && call(torch()->is_neg).is(Py_True)) refuse(", not a negated view");
        if (check && elements > available()) refuse(", with memory");
        const nb::object value = call(torch()->data_ptr);
        void* const data = PyLong_AsVoidPtr(value.ptr());
        if (!data && PyErr_Occurred()) throw nb::python_error();
        if (!data && elements) refuse(", with memory");
        return static_cast<T*>(data);
    }

    // Elements from the tensor's first to the end of its storage, which may have been made smaller.
    ptrdiff_t available() const {
        const nb::object storage = call(torch()->untyped_storage);
        const nb::object bytes = nb::steal(PyObject_CallMethodNoArgs(storage.ptr(), torch()->nbytes));
        if (!bytes) throw nb::python_error();
        return number(bytes.ptr()) / ptrdiff_t(sizeof(T)) - number(call(torch()->storage_offset).ptr());
    }

    static ptrdiff_t number(PyObject* value) {
        const ptrdiff_t found = PyLong_AsSsize_t(value);
        if (found == -1 && PyErr_Occurred()) throw nb::python_error();
        return found;
    }

    const char* name_;
    nb::handle object_;
};

}  // namespace tombola
