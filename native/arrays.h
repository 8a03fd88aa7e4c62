// NumPy arrays in and out of C functions, and error numbers as septet's exceptions.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>

#include "septet.h"

namespace septet {

namespace nb = nanobind;

// Any array a caller passes; `view` checks it. Read-only arrays (of a mapped file) are welcome.
using AnyArray = nb::ndarray<nb::ro>;

[[noreturn]] inline void raise(const char* kind, const std::string& requirement, const std::string& got, const char* hint) {
    const nb::object type = nb::module_::import_("septet.errors").attr(kind);
    const nb::object error = type(requirement, got, hint);
    PyErr_SetObject(type.ptr(), error.ptr());
    throw nb::python_error();
}

template <class T> const char* dtype_name() {
    if (std::is_same_v<T, float>) return "float32";
    if (std::is_same_v<T, uint8_t>) return "uint8";
    if (std::is_same_v<T, int8_t>) return "int8";
    if (std::is_same_v<T, uint16_t>) return "uint16";
    return std::is_same_v<T, int16_t> ? "int16" : "int32";
}

inline std::string describe(const AnyArray& array) {
    const nb::dlpack::dtype dtype = array.dtype();
    static const char* const kinds[] = {"int", "uint", "float"};
    std::string text = (dtype.code < 3 ? kinds[dtype.code] : "other") + std::to_string(dtype.bits) + " [";
    for (size_t i = 0; i < array.ndim(); i++) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

inline bool is_contiguous(const AnyArray& array) {
    int64_t step = 1;
    for (size_t i = array.ndim(); i-- > 0; step *= static_cast<int64_t>(array.shape(i)))
        if (array.shape(i) != 1 && array.stride(i) != step && array.size() != 0) return false;
    return true;
}

constexpr int64_t kAny = -1;

// The data of a contiguous array of this type and shape (kAny: every size); ShapeError otherwise.
template <class T>
const T* view(const AnyArray& array, const char* name, std::initializer_list<int64_t> shape) {
    bool good = array.dtype() == nb::dtype<T>() && array.device_type() == nb::device::cpu::value && array.ndim() == shape.size() && is_contiguous(array);
    std::string wanted;
    size_t axis = 0;
    for (const int64_t size : shape) {
        good = good && (size == kAny || static_cast<int64_t>(array.shape(axis)) == size);
        wanted += (axis++ ? ", " : "") + (size == kAny ? std::string("any") : std::to_string(size));
    }
    if (!good) raise("ShapeError", std::string(name) + " must be contiguous " + dtype_name<T>() + " [" + wanted + "]", describe(array), "check the sizes");
    return static_cast<const T*>(array.data());
}

inline int64_t size_of(const AnyArray& array, size_t axis) { return axis < array.ndim() ? static_cast<int64_t>(array.shape(axis)) : 0; }

// A new NumPy array, not initialized.
template <class T> struct Result {
    T* data;
    nb::object array;

    explicit Result(std::initializer_list<size_t> shape) {
        size_t count = 1;
        for (const size_t size : shape) count *= size;
        data = new T[count ? count : 1];
        nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
        array = nb::cast(nb::ndarray<nb::numpy, T>(data, shape.size(), shape.begin(), owner));
    }
};

// Runs a C function without the interpreter's lock and raises what its error number means. `got` describes the arguments.
template <class Call>
void run(const Call& call, const std::string& got) {
    int error;
    {
        nb::gil_scoped_release released;
        error = call();
    }
    if (error == SEPTET_OK) return;
    if (error == SEPTET_ERROR_MEMORY) throw std::bad_alloc();
    const std::string what = septet_error_message(error);
    if (error == SEPTET_ERROR_RANGE) raise("CodeRangeError", "every symbol or encoder input must be in range", got, "check the bits per pair");
    if (error == SEPTET_ERROR_BITS) raise("OptionError", "bits per pair must be 6, 7 or 8", got, "choose 3.0, 3.5 or 4.0 bits per weight");
    if (error == SEPTET_ERROR_CODE) raise("OptionError", "activations must be int8 or float", got, "choose one of the two");
    if (error == SEPTET_ERROR_INCOMPLETE) raise("CheckpointError", "a model must have all its weights", "an engine that lacks some", "fetch the checkpoint again");
    if (error == SEPTET_ERROR_TOKEN) raise("OptionError", "every token must be in the vocabulary", got, "use the tokenizer of this model");
    if (error == SEPTET_ERROR_CONTEXT) raise("OptionError", "a text must fit the context", got, "shorten the text, or make an engine with a longer context");
    if (error == SEPTET_ERROR_THREADS) raise("OptionError", "a number of threads must be positive", got, "check threads and SEPTET_THREADS");
    if (error == SEPTET_ERROR_CPU_UNKNOWN || error == SEPTET_ERROR_CPU_UNSUPPORTED)
        raise("BackendUnavailableError", "SEPTET_CPU must name an instruction set that works here", what, "see septet info, or leave SEPTET_CPU unset");
    raise("ShapeError", "sizes must fit each other", what + " (" + got + ")", "check the sizes");
}

}  // namespace septet
