// sign_momentum's lists, checked and turned into what its kernel takes (cpu/sign_momentum.hpp).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/sign_momentum.hpp"
#include "tensor_lists.hpp"

namespace fastlora {

class SignMomentumTable {
public:
    SignMomentumTable(pybind11::object tensor, pybind11::object exchange)
        : reader_(std::move(tensor), std::move(exchange)) {}

    // Takes the lists, of which params and grads may be None; `by_row`: None, or a byte per tensor
    // whose rows matter. False, and nothing to run, where anything of it does not fit or is not
    // contiguous float32, bfloat16 or float16 on the CPU (momentum: float32, bfloat16 or EightBit).
    bool read(pybind11::object params, pybind11::object grads, pybind11::object momenta,
              pybind11::object by_row) {
        const List theta(params), g(grads), m(momenta);
        const std::int64_t count = m.size();
        entries_.clear();
        if ((theta && theta.size() != count) || (g && g.size() != count)) return false;
        PlainTensor seen, other;
        for (std::int64_t i = 0; i < count; ++i) {
            for (const List* list : {&theta, &g, &m}) list->fetch(i + AHEAD);
            Entry entry{};
            if (!read_momentum(m[i], seen, entry)) return false;
            entry.count = seen.count;
            entry.row = seen.row;
            if (theta) {
                if (!reader_.read(theta[i], other) || other.shape != seen.shape) return false;
                if (!stored(other.kind, entry.param_type)) return false;
                entry.param = other.data;
            }
            if (g) {
                if (!reader_.read(g[i], other) || other.shape != seen.shape) return false;
                if (!stored(other.kind, entry.grad_type)) return false;
                entry.grad = other.data;
            }
            entries_.push_back(entry);
        }
        if (written_twice()) {
            entries_.clear();
            return false;
        }
        cut(by_row.is_none() ? nullptr : PyBytes_AsString(by_row.ptr()));
        return true;
    }

    std::int64_t size() const { return static_cast<std::int64_t>(entries_.size()); }

    // lr, decay and floor: one number each, or one a tensor. `relative`: None or a byte a tensor,
    // of 0, 1 (tensor) and 2 (rows). Addresses are null for what is not there.
    void run(double a, double b, double c, double d, const std::vector<double>& lr,
             const std::vector<double>& decay, const std::vector<double>& floor,
             pybind11::object relative, const std::vector<std::uintptr_t>& rows, bool mask_momentum,
             pybind11::object shrink, const std::vector<float>& centers, std::uintptr_t skip,
             std::uintptr_t lost, bool moves, const std::vector<std::uint32_t>& keys, int threads,
             const std::string& isa) const {
        const auto kernel = FASTLORA_PICK(find_isa(isa), sign_momentum);
        SignMomentum call{};
        call.entries = entries_.data();
        call.count = size();
        call.chunks = chunks_.data();
        call.chunk_count = static_cast<std::int64_t>(chunks_.size());
        call.a = static_cast<float>(a);
        call.b = static_cast<float>(b);
        call.c = static_cast<float>(c);
        call.d = static_cast<float>(d);
        call.lr = lr.data();
        call.decay = decay.data();
        call.floor = floor.data();
        call.many = lr.size() > 1;
        if (!relative.is_none()) {
            call.relative = reinterpret_cast<const Relative*>(PyBytes_AsString(relative.ptr()));
        }
        if (!rows.empty()) call.rows = reinterpret_cast<const std::uint8_t* const*>(rows.data());
        call.mask_momentum = mask_momentum;
        call.shrinks = !shrink.is_none();
        if (call.shrinks) call.shrink = shrink.cast<float>();
        call.centers = centers.data();
        call.skip = reinterpret_cast<const std::uint8_t*>(skip);
        call.lost = reinterpret_cast<std::uint8_t*>(lost);
        call.moves = moves;
        if (!keys.empty()) call.keys = keys.data();
        pybind11::gil_scoped_release released;
        kernel(call, threads);
    }

private:
    // About what stays in a core's second cache from the look at it to the update.
    static constexpr std::int64_t CHUNK = 32768;
    static constexpr std::int64_t AHEAD = 8;

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
        // Asks the caches for an object that is read soon; a step has driven them all out.
        void fetch(std::int64_t i) const {
            if (i < size()) __builtin_prefetch((*this)[i]);
        }
        PyObject* operator[](std::int64_t i) const {
            return PySequence_Fast_GET_ITEM(fast_.ptr(), i);
        }

    private:
        pybind11::object fast_;
    };

    static bool stored(char kind, Stored& out) {
        out = kind == 'f' ? Stored::f32 : kind == 'b' ? Stored::bf16 : Stored::f16;
        return kind != 'q';
    }

    bool read_momentum(PyObject* momentum, PlainTensor& seen, Entry& entry) const {
        if (reader_.is_tensor(momentum)) {
            if (!reader_.read(momentum, seen) || seen.kind == 'h') return false;
            entry.momentum = seen.data;
            return stored(seen.kind, entry.momentum_type);
        }
        const pybind11::handle coded(momentum);
        if (!pybind11::hasattr(coded, "codes") || !pybind11::hasattr(coded, "scales")) return false;
        PlainTensor scales;
        if (!reader_.read(coded.attr("scales").ptr(), scales) || scales.kind != 'f') return false;
        if (!reader_.read(coded.attr("codes").ptr(), seen) || seen.kind != 'q') return false;
        if (scales.count != (seen.count + Q8_BLOCK - 1) / Q8_BLOCK) return false;
        entry.momentum = seen.data;
        entry.scales = reinterpret_cast<float*>(scales.data);
        entry.momentum_type = Stored::q8;
        return true;
    }

    bool written_twice() {
        addresses_.clear();
        for (const Entry& entry : entries_) {
            if (!entry.count) continue;
            if (entry.param) addresses_.push_back(entry.param);
            addresses_.push_back(entry.momentum);
        }
        std::sort(addresses_.begin(), addresses_.end());
        return std::adjacent_find(addresses_.begin(), addresses_.end()) != addresses_.end();
    }

    void cut(const char* by_row) {
        chunks_.clear();
        for (std::int64_t i = 0; i < size(); ++i) {
            const Entry& entry = entries_[i];
            if (!entry.count) continue;
            std::int64_t unit = Q8_BLOCK;
            if (by_row && by_row[i]) {
                unit = entry.momentum_type == Stored::q8 ? common(entry.row, Q8_BLOCK) : entry.row;
            }
            const std::int64_t length = std::max<std::int64_t>(CHUNK / unit, 1) * unit;
            for (std::int64_t first = 0; first < entry.count; first += length) {
                chunks_.push_back({i, first, std::min(first + length, entry.count)});
            }
        }
    }

    static std::int64_t common(std::int64_t one, std::int64_t other) {
        std::int64_t a = one, b = other;
        while (b) {
            const std::int64_t rest = a % b;
            a = b;
            b = rest;
        }
        return one / a * other;
    }

    TensorReader reader_;
    std::vector<Entry> entries_;
    std::vector<Chunk> chunks_;
    std::vector<const void*> addresses_;
};

}  // namespace fastlora
