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
};

}  // namespace fastlora
