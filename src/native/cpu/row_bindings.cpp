// The row kernels of single instruction sets in Python, for tests: every set has to give the same bits.

#include "bindings.hpp"
#include "prepare.hpp"
#include "row_kernels.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace fewbit {
namespace {

template <typename T> using Row = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check(bool holds, const char *message) {
    if (!holds) throw std::invalid_argument(message);
}

const RowKernels &kernels_of(const std::string &name) {
    for (const RowKernels *kernels : row_kernels_available()) {
        if (name == kernels->name) return *kernels;
    }
    throw std::invalid_argument("this CPU has no " + name);
}

std::tuple<float, std::int32_t> quantize(const std::string &set, const Row<const float> &x, float range, float static_scale,
                                         const Row<std::int8_t> &codes) {
    check(codes.size() >= x.size(), "codes are fewer than values");
    float scale = 0;
    const std::int32_t sum = kernels_of(set).quantize(x.data(), x.size(), codes.size(), range, static_scale, codes.data(), &scale);
    return {scale, sum};
}

void normalize(const std::string &set, const Row<const float> &x, const Row<const float> &weight, float factor, bool round,
               const Row<float> &out) {
    check(weight.size() == x.size() && out.size() == x.size(), "x, weight and out differ in size");
    kernels_of(set).normalize(x.data(), weight.data(), factor, round, out.data(), x.size());
}

void widen(const std::string &set, const Row<const std::uint16_t> &x, const Row<float> &out) {
    check(out.size() == x.size(), "x and out differ in size");
    kernels_of(set).widen(x.data(), out.data(), x.size());
}

} // namespace

void bind_rows(nb::module_ &m) {
    nb::module_ rows = m.def_submodule("rows", "Row kernels of single instruction sets, for tests.");
    rows.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const RowKernels *kernels : row_kernels_available()) names.emplace_back(kernels->name);
        return names;
    });
    rows.def("quantize", &quantize, "instruction_set"_a, "x"_a, "range"_a, "static_scale"_a, "codes"_a);
    rows.def("normalize", &normalize, "instruction_set"_a, "x"_a, "weight"_a, "factor"_a, "round"_a, "out"_a);
    rows.def("widen", &widen, "instruction_set"_a, "x"_a, "out"_a);
    rows.def(
        "sum_of_squares",
        [](const std::string &set, const Row<const float> &x) { return kernels_of(set).sum_of_squares(x.data(), x.size()); },
        "instruction_set"_a, "x"_a);
}

} // namespace fewbit
