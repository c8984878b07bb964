// Lists of tensors as they come from Python, read without a call into Python for each: torch hands
// out addresses, shapes and dtypes through DLPack's exchange table (its __dlpack_c_exchange_api__,
// torch 2.10 and newer); of an older torch, the tensors' own attributes are asked.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fastlora {

namespace dlpack {

// The parts of DLPack's C interface, version 1, that are used here.
struct Version {
    std::uint32_t major, minor;
};
struct Device {
    std::int32_t type, id;
};
struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    std::int32_t dimensions;
    DataType type;
    std::int64_t *shape, *strides;
    std::uint64_t offset;
};
struct Exchange {
    Version version;
    void* previous;
    void *allocate, *export_managed, *import_managed;
    int (*describe)(void* object, Tensor* out);
    void* current_stream;
};
constexpr std::int32_t CPU = 1;
constexpr std::uint8_t INT = 0, FLOAT = 2, BFLOAT = 4;

}  // namespace dlpack

// A list or tuple, or nothing.
class List {
public:
    explicit List(const pybind11::object& from) {
        if (from.is_none()) return;
        fast_ = pybind11::reinterpret_steal<pybind11::object>(
            PySequence_Fast(from.ptr(), "expected a sequence of tensors"));
        if (!fast_) throw pybind11::error_already_set();
    }
    explicit operator bool() const { return static_cast<bool>(fast_); }
    std::int64_t size() const { return fast_ ? PySequence_Fast_GET_SIZE(fast_.ptr()) : 0; }
    PyObject* operator[](std::int64_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), i); }

private:
    pybind11::object fast_;
};

// The attribute; null, and no error, where there is none.
inline pybind11::object attribute(PyObject* object, const pybind11::object& name) {
    PyObject* found = PyObject_GetAttr(object, name.ptr());
    if (!found) PyErr_Clear();
    return pybind11::reinterpret_steal<pybind11::object>(found);
}

// A tensor in the memory of the CPU, row-major.
struct PlainTensor {
    char* data;
    char kind;  // 'f' float32, 'b' bfloat16, 'h' float16, 'q' int8
    std::vector<std::int64_t> shape;
    std::int64_t count, row;  // elements, and those of the last axis (1 of none)
};

class TensorReader {
public:
    // `tensor`: the class torch.Tensor; `exchange`: its table in a capsule, or None.
    TensorReader(pybind11::object tensor, pybind11::object exchange) : tensor_(std::move(tensor)) {
        if (exchange.is_none()) return;
        table_ = static_cast<const dlpack::Exchange*>(
            PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
        if (!table_) throw pybind11::error_already_set();
        if (table_->version.major != 1) table_ = nullptr;
        find_implementation();
    }

    // Asks the caches for what is looked at of a list's tensors from `at` on, in order: a pass over a
    // model's memory has driven it out, and to wait for its lines one after the other takes longest.
    void fetch(const List& list, std::int64_t at) const {
        if (at + 3 * AHEAD < list.size()) __builtin_prefetch(list[at + 3 * AHEAD]);
        if (at + 2 * AHEAD < list.size()) fetch_implementation(list[at + 2 * AHEAD]);
        if (at + AHEAD < list.size()) fetch_parts(list[at + AHEAD]);
    }

    bool is_tensor(PyObject* object) const {
        return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_.ptr()));
    }

    // False for what is no such tensor.
    bool read(PyObject* object, PlainTensor& out) const {
        if (!is_tensor(object)) return false;
        return table_ ? read_table(object, out) : read_attributes(object, out);
    }

private:
    static constexpr std::int64_t AHEAD = 4;

    // Where a tensor's object has the address of its C++ part, found in one of our own.
    void find_implementation() {
        const pybind11::object probe = tensor_();
        const pybind11::object address = pybind11::getattr(probe, "_cdata", pybind11::none());
        if (address.is_none()) return;
        const auto sought = address.cast<std::uintptr_t>();
        const auto* words = reinterpret_cast<const std::uintptr_t*>(probe.ptr());
        const auto size = reinterpret_cast<PyTypeObject*>(tensor_.ptr())->tp_basicsize;
        const std::size_t count = static_cast<std::size_t>(size) / sizeof *words;
        for (std::size_t at = sizeof(PyObject) / sizeof *words; at < count; ++at) {
            if (words[at] == sought) implementation_ = at;
        }
    }

    // The first words of a tensor's C++ part; null where they are not known.
    const char* const* words(PyObject* object) const {
        if (!implementation_ || !is_tensor(object)) return nullptr;
        return reinterpret_cast<const char* const* const*>(object)[implementation_];
    }

    void fetch_implementation(PyObject* object) const {
        if (const auto* start = reinterpret_cast<const char*>(words(object))) {
            for (int line = 0; line < 4; ++line) __builtin_prefetch(start + 64 * line);
        }
    }

    // In torch 2.13 the third word is the address of the storage, the sixth that of the version.
    // They are only fetched from, which does no harm whatever else they may be.
    void fetch_parts(PyObject* object) const {
        if (const auto* start = words(object)) {
            __builtin_prefetch(start[2]);
            __builtin_prefetch(start[2] + 64);
            __builtin_prefetch(start[5]);
        }
    }

    bool read_table(PyObject* object, PlainTensor& out) const {
        dlpack::Tensor found;
        if (table_->describe(object, &found) != 0) {  // a sparse one, for instance
            PyErr_Clear();
            return false;
        }
        if (found.device.type != dlpack::CPU || found.type.lanes != 1) return false;
        const int bits = found.type.bits;
        switch (found.type.code) {
            case dlpack::FLOAT: out.kind = bits == 32 ? 'f' : bits == 16 ? 'h' : 0; break;
            case dlpack::BFLOAT: out.kind = bits == 16 ? 'b' : 0; break;
            case dlpack::INT: out.kind = bits == 8 ? 'q' : 0; break;
            default: out.kind = 0;
        }
        if (!out.kind) return false;
        out.data = static_cast<char*>(found.data) + found.offset;
        out.shape.assign(found.shape, found.shape + found.dimensions);
        measure(out);
        if (out.count && !out.data) return false;  // freed
        std::int64_t step = 1;
        for (int axis = found.dimensions - 1; axis >= 0; --axis) {
            if (out.count && found.shape[axis] != 1 && found.strides[axis] != step) return false;
            step *= found.shape[axis];
        }
        return true;
    }

    bool read_attributes(PyObject* object, PlainTensor& out) const {
        namespace py = pybind11;
        const py::handle tensor(object);
        const std::string dtype = py::str(tensor.attr("dtype"));
        const std::string layout = py::str(tensor.attr("layout"));
        out.kind = dtype == "torch.float32"    ? 'f'
                   : dtype == "torch.bfloat16" ? 'b'
                   : dtype == "torch.float16"  ? 'h'
                   : dtype == "torch.int8"     ? 'q'
                                               : 0;
        if (!out.kind || layout != "torch.strided" ||
            !py::str(tensor.attr("device").attr("type")).equal(py::str("cpu")) ||
            !tensor.attr("is_contiguous")().cast<bool>()) {
            return false;
        }
        out.data = reinterpret_cast<char*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
        out.shape = tensor.attr("shape").cast<std::vector<std::int64_t>>();
        measure(out);
        return !out.count || out.data;
    }

    static void measure(PlainTensor& out) {
        out.count = 1;
        for (std::int64_t size : out.shape) out.count *= size;
        out.row = out.shape.empty() ? 1 : out.shape.back();
    }

    pybind11::object tensor_;
    const dlpack::Exchange* table_ = nullptr;
    std::size_t implementation_ = 0;  // which word of an object it is; 0: not known
};

}  // namespace fastlora
