// Operators of PyTorch, called through its C interfaces: the stable one, and that of AOTInductor. They are looked up in
// PyTorch's own library when the program runs, so that one build of this module is for every PyTorch, those without them
// included.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace tombola {
namespace {

using Handle = void*;    // of a tensor or a list, which its maker frees; but lists and `call` own what they are given
using Value = uint64_t;  // an argument or a result of an operator: the bits of a number, or a handle

// Every function but the last four returns 0 if it succeeds.
struct Interface {
    int32_t (*call)(const char* name, const char* overload, Value* stack, uint64_t version) = nullptr;
    int32_t (*make_tensor)(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t offset,
                           int32_t dtype, int32_t device, int32_t device_index, Handle* made) = nullptr;
    int32_t (*refer)(Handle tensor, Handle* made) = nullptr;
    int32_t (*free_tensor)(Handle tensor) = nullptr;
    int32_t (*make_list)(size_t reserved, Handle* made) = nullptr;
    int32_t (*append)(Handle list, Value value) = nullptr;
    int32_t (*make_optional)(Value** made) = nullptr;
    int32_t (*mm)(Handle target, Handle a, Handle b) = nullptr;
    int32_t (*addmm)(Handle target, Handle bias, Handle a, Handle b, double beta, double alpha) = nullptr;
    int32_t (*multiply)(Handle a, Handle b, Handle* bias, const char* then, const double** numbers, int64_t count,
                        const char** algorithm, Handle* made) = nullptr;  // a b^T by oneDNN
    int32_t (*data_of)(Handle tensor, void** data) = nullptr;
    int32_t (*float32)() = nullptr;
    int32_t (*int64)() = nullptr;
    int32_t (*cpu)() = nullptr;
    const char* (*message)() = nullptr;  // of the latest error

    // Look the functions up in the library of this path, which the program has loaded; return whether it has them all. If
    // not, those that were found before stay. `multiply` is only looked up if `onednn` is true.
    bool load(const char* path, bool onednn) {
#if defined(_WIN32)
        (void)path, (void)onednn;
        return false;
#else
        void* const library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
        if (!library) return false;
        bool all = true;
        Interface found = *this;
        const auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            all = all && function;
        };
        find(found.call, "torch_call_dispatcher");
        find(found.make_tensor, "aoti_torch_create_tensor_from_blob");
        find(found.refer, "aoti_torch_new_tensor_handle");
        find(found.free_tensor, "aoti_torch_delete_tensor_object");
        find(found.make_list, "torch_new_list_reserve_size");
        find(found.append, "torch_list_push_back");
        find(found.make_optional, "torch_new_stable_ivalue");
        find(found.mm, "aoti_torch_cpu_mm_out");
        find(found.addmm, "aoti_torch_cpu_addmm_out");
        if (onednn) find(found.multiply, "aoti_torch_cpu__linear_pointwise");
        find(found.data_of, "aoti_torch_get_data_ptr");
        find(found.float32, "aoti_torch_dtype_float32");
        find(found.int64, "aoti_torch_dtype_int64");
        find(found.cpu, "aoti_torch_device_type_cpu");
        find(found.message, "torch_exception_get_what_without_backtrace");
        dlclose(library);  // which PyTorch itself keeps
        if (all) *this = found;
        return all;
#endif
    }
};

inline Interface& pytorch() {
    static Interface functions;
    return functions;
}

inline void succeed(int32_t status, const char* name) {
    if (status) throw std::runtime_error(std::string("PyTorch's ") + name + ": " + pytorch().message());
}

// A tensor over memory that outlives it.
using Operand = std::shared_ptr<void>;

inline Operand owned(Handle made) {
    return Operand(made, [](Handle tensor) { pytorch().free_tensor(tensor); });
}

inline Operand operand(void* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                       int32_t dtype) {
    const Interface& torch = pytorch();
    Handle made;
    succeed(torch.make_tensor(data, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), 0, dtype,
                              torch.cpu(), 0, &made),
            "create_tensor_from_blob");
    return owned(made);
}

inline Operand floats(float* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
    return operand(data, sizes, strides, pytorch().float32());
}

inline Operand one_float(float* data) { return floats(data, {}, {}); }

// A new tensor a b^T, (m, n), for a, (m, k), and b, (n, k), by oneDNN.
inline Operand multiplied(const Operand& a, const Operand& b) {
    const char* algorithm = "";
    Handle made;
    succeed(pytorch().multiply(a.get(), b.get(), nullptr, "none", nullptr, 0, &algorithm, &made), "_linear_pointwise");
    return owned(made);
}

inline const float* numbers_of(const Operand& tensor) {
    void* data;
    succeed(pytorch().data_of(tensor.get(), &data), "get_data_ptr");
    return static_cast<const float*>(data);
}

// Arguments, each of which the operator that receives it frees.
constexpr Value none = 0;

inline Value given(const Operand& tensor) {
    Handle made;
    succeed(pytorch().refer(tensor.get(), &made), "new_tensor_handle");
    return reinterpret_cast<Value>(made);
}

inline Value given(double number) {
    Value value;
    std::memcpy(&value, &number, sizeof value);
    return value;
}

inline Value given(int64_t number) { return static_cast<Value>(number); }
inline Value given(int32_t number) { return given(int64_t(number)); }
inline Value given(bool flag) { return flag; }

inline Value list_of(const std::vector<Value>& values) {
    Handle made;
    succeed(pytorch().make_list(values.size(), &made), "new_list");
    for (const Value value : values) succeed(pytorch().append(made, value), "list_push_back");
    return reinterpret_cast<Value>(made);
}

inline Value given(const std::vector<Operand>& tensors) {
    std::vector<Value> values;
    values.reserve(tensors.size());
    for (const Operand& tensor : tensors) values.push_back(given(tensor));
    return list_of(values);
}

inline Value optional(Value value) {
    Value* made;
    succeed(pytorch().make_optional(&made), "new_stable_ivalue");
    *made = value;
    return reinterpret_cast<Value>(made);
}

// Call the operator, which writes to `outputs` of its arguments and returns these again. The arguments are those of the
// schema, all of them: `tombola.kernels.stretch` compares the schemas. An operator that fails has freed its arguments,
// too, because PyTorch takes all of them over before it calls the operator.
template <class... Arguments>
void call(const char* name, const char* overload, int outputs, const Arguments&... arguments) {
    constexpr uint64_t version = uint64_t(2) << 56 | uint64_t(13) << 48;  // for which the calls are written
    Value stack[] = {arguments...};
    succeed(pytorch().call(name, overload, stack, version), name);
    for (int i = 0; i < outputs; ++i) pytorch().free_tensor(reinterpret_cast<Handle>(stack[i]));
}

}  // namespace
}  // namespace tombola
