// The Python face of fewbit's native code; its types are written down in src/fewbit/_native.pyi.

#include "cpu/bindings.hpp"
#include "cpu/engine/engine_bindings.hpp"
#include "permute.hpp"
#include "read_bandwidth.hpp"
#include "scale_search.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, std::size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

fewbit::Groups groups_of(const Array<const float, 2> &weight, const std::optional<Array<const float, 1>> &importance,
                         const Array<const float, 2> &scale, int low, int high) {
    const std::size_t rows = weight.shape(0), columns = weight.shape(1), per_row = scale.shape(1);
    if (scale.shape(0) != rows || per_row == 0 || columns % per_row != 0) throw std::invalid_argument("scales do not fit the weight");
    if (importance && importance->shape(0) != columns) throw std::invalid_argument("importance does not fit the weight");
    return {weight.data(), importance ? importance->data() : nullptr, rows, columns, columns / per_row, float(low), float(high)};
}

void least_squares_scales(const Array<const float, 2> &weight, const std::optional<Array<const float, 1>> &importance,
                          const Array<const float, 2> &start, const Array<const float, 1> &factors, Array<float, 2> &out, int low, int high,
                          int threads) {
    const fewbit::Groups groups = groups_of(weight, importance, start, low, high);
    if (out.shape(0) != start.shape(0) || out.shape(1) != start.shape(1)) throw std::invalid_argument("out has not the shape of start");
    nb::gil_scoped_release released;
    fewbit::least_squares_scales(groups, start.data(), factors.data(), factors.shape(0), out.data(), threads);
}

void squared_error(const Array<const float, 2> &weight, const std::optional<Array<const float, 1>> &importance,
                   const Array<const float, 2> &scale, Array<float, 2> &out, int low, int high, int threads) {
    const fewbit::Groups groups = groups_of(weight, importance, scale, low, high);
    if (out.shape(0) != scale.shape(0) || out.shape(1) != scale.shape(1)) throw std::invalid_argument("out has not the shape of scale");
    nb::gil_scoped_release released;
    fewbit::squared_error(groups, scale.data(), out.data(), threads);
}

using Order = Array<const std::int64_t, 1>;

void check_order(const Order &order, std::size_t limit) {
    for (std::size_t i = 0; i < order.shape(0); ++i)
        if (order.data()[i] < 0 || std::size_t(order.data()[i]) >= limit) throw std::invalid_argument("an index lies outside of the matrix");
}

void gather_transposed(const Array<const float, 2> &in, const std::optional<Order> &rows, const Order &columns, Array<float, 2> &out,
                       int threads) {
    const std::size_t row_count = rows ? rows->shape(0) : in.shape(0);
    if (out.shape(0) != columns.shape(0) || out.shape(1) != row_count) throw std::invalid_argument("out has not the shape [columns, rows]");
    check_order(columns, in.shape(1));
    if (rows) check_order(*rows, in.shape(0));
    nb::gil_scoped_release released;
    fewbit::gather_transposed(in.data(), in.shape(1), rows ? rows->data() : nullptr, row_count, columns.data(), columns.shape(0), out.data(),
                              threads);
}

void scatter_transposed(const Array<const float, 2> &in, std::size_t first, const Order &columns, Array<float, 2> &out, int threads) {
    if (in.shape(0) != columns.shape(0) || out.shape(1) != columns.shape(0) || first + out.shape(0) > in.shape(1))
        throw std::invalid_argument("the matrices and the order of columns do not fit together");
    check_order(columns, out.shape(1));
    nb::gil_scoped_release released;
    fewbit::scatter_transposed(in.data(), in.shape(1), first, out.shape(0), columns.data(), columns.shape(0), out.data(), threads);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native code of fewbit: CPU kernels, the memory bandwidth probe and the search for scales.";
    fewbit::bind_cpu(m);
    m.def("instruction_set", &fewbit::instruction_set,
          "The widest read loop that this CPU runs: \"avx512\", \"avx2\" or \"portable\".");
    m.def("read_bandwidth", &fewbit::read_bandwidth, "bytes"_a, "threads"_a, "seconds"_a = 1.0, nb::call_guard<nb::gil_scoped_release>(),
          "DRAM read bandwidth in 1e9 bytes per second, the best pass over a buffer of `bytes` with `threads` threads.");
    m.def("read_loops", [] {
        nb::list kinds;
        for (const fewbit::ReadLoopKind &kind : fewbit::read_loops()) kinds.append(nb::make_tuple(kind.distance, kind.streams));
        return kinds;
    });
    nb::class_<fewbit::ReadBuffer>(m, "ReadBuffer")
        .def(nb::init<std::size_t, int, bool>(), "bytes"_a, "threads"_a, "huge_pages"_a = true)
        .def_prop_ro("bytes", &fewbit::ReadBuffer::bytes)
        .def(
            "read", [](fewbit::ReadBuffer &buffer, std::size_t distance, std::size_t streams) { return buffer.read({distance, streams}); },
            "distance"_a = 0, "streams"_a = 1, nb::call_guard<nb::gil_scoped_release>());
    m.def("least_squares_scales", &least_squares_scales, "weight"_a, "importance"_a.none(), "start"_a, "factors"_a, "out"_a, "low"_a,
          "high"_a, "threads"_a, "The best least squares scale of each group into `out`.");
    m.def("squared_error", &squared_error, "weight"_a, "importance"_a.none(), "scale"_a, "out"_a, "low"_a, "high"_a, "threads"_a,
          "The weighted squared error of each group at given scales into `out`.");
    m.def("gather_transposed", &gather_transposed, "source"_a, "rows"_a.none(), "columns"_a, "out"_a, "threads"_a,
          "out[k, r] = source[rows[r], columns[k]]; all rows in their order when `rows` is None.");
    m.def("scatter_transposed", &scatter_transposed, "source"_a, "first"_a, "columns"_a, "out"_a, "threads"_a,
          "out[r, columns[k]] = source[k, first + r].");
    fewbit::engine::bind_engine(m);
}
