#include "bindings.hpp"

#include "apply.hpp"
#include "dense.hpp"
#include "digit_linear.hpp"
#include "int_linear.hpp"
#include "sequence.hpp"
#include "table_linear.hpp"
#include "thread_pool.hpp"
#include "weight_memory.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

namespace nb = nanobind;
using namespace nb::literals;

namespace fewbit {
namespace {

template <typename T, std::size_t Dimensions> using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <typename T, std::size_t Dimensions> using Strided = nb::ndarray<T, nb::ndim<Dimensions>, nb::device::cpu>;
using Matrix = nb::ndarray<nb::ndim<2>, nb::device::cpu>;

void check(bool holds, const char *message) {
    if (!holds) throw std::invalid_argument(message);
}

bool is_float32(const nb::dlpack::dtype &type) { return type == nb::dtype<float>(); }
bool is_bfloat16(const nb::dlpack::dtype &type) { return type.code == std::uint8_t(nb::dlpack::dtype_code::Bfloat) && type.bits == 16; }

Type type_of(const nb::dlpack::dtype &type) {
    check(is_float32(type) || is_bfloat16(type), "tensors are float32 or bfloat16");
    return is_float32(type) ? Type::float32 : Type::bfloat16;
}

void apply_linear(const Linear &linear, const Matrix &x, const Matrix &y, const std::optional<Array<const float, 1>> &bias) {
    check(x.shape(1) == linear.in_features, "x has not in_features columns");
    check(y.shape(0) == x.shape(0) && y.shape(1) == linear.out_features, "y is not [rows of x, out_features]");
    check((x.stride(1) == 1 || x.shape(1) == 1) && x.stride(0) >= 0, "the columns of x are not next to each other");
    check((y.stride(1) == 1 || y.shape(1) == 1) && y.stride(0) >= 0, "the columns of y are not next to each other");
    check(!bias || bias->shape(0) == linear.out_features, "bias has not out_features entries");
    const Rows rows{x.data(), type_of(x.dtype()), x.shape(0), x.shape(1), std::size_t(x.stride(0))};
    const Type y_type = type_of(y.dtype());
    nb::gil_scoped_release released;
    apply(linear, rows, y.data(), y_type, std::size_t(y.stride(0)), bias ? bias->data() : nullptr);
}

void multiply_all(const std::vector<const Linear *> &linears, const Matrix &x, const std::vector<Array<float, 2>> &y) {
    check(x.stride(1) == 1 || x.shape(1) == 1, "the columns of x are not next to each other");
    check(x.stride(0) >= 0 && linears.size() == y.size(), "as many results as linears are needed");
    std::vector<float *> results;
    for (std::size_t i = 0; i < linears.size(); ++i) {
        check(linears[i] != nullptr && linears[i]->in_features == x.shape(1), "x has not in_features columns");
        check(y[i].shape(0) == x.shape(0) && y[i].shape(1) == linears[i]->out_features, "y is not [rows of x, out_features]");
        results.push_back(y[i].data());
    }
    const Rows rows{x.data(), type_of(x.dtype()), x.shape(0), x.shape(1), std::size_t(x.stride(0))};
    nb::gil_scoped_release released;
    multiply_in_turn(linears, rows, results);
}

// Bytes from one tile of a packed tensor [tiles, ...] to the next. Tiles begin on cache lines, and within a tile nothing lies between its values.
template <class Packed> std::size_t tile_stride(const Packed &packed, std::size_t tiles, std::size_t alignment) {
    check(packed.ndim() > 0 && packed.shape(0) == tiles, "codes, scales and zeros have not the same tiles");
    std::int64_t inner = 1;
    for (std::size_t i = packed.ndim() - 1; i > 0; inner *= std::int64_t(packed.shape(i)), --i) {
        check(packed.shape(i) == 1 || packed.stride(i) == inner, "the values of a tile are not next to each other");
    }
    check(tiles <= 1 || packed.stride(0) >= inner, "tiles overlap");
    const std::size_t stride = std::size_t(tiles <= 1 ? inner : packed.stride(0)) * packed.itemsize();
    check((tiles <= 1 || stride % alignment == 0) && reinterpret_cast<std::uintptr_t>(packed.data()) % alignment == 0,
          "tiles do not begin on a cache line");
    return stride;
}

std::unique_ptr<Linear> int_linear(const Strided<const std::uint8_t, 3> &codes, const nb::ndarray<nb::device::cpu, nb::ro> &scales,
                                   const std::optional<Strided<const std::int8_t, 3>> &zeros, std::size_t out_features,
                                   std::size_t in_features, std::size_t group, int bits, float range, float static_scale,
                                   const std::string &instruction_set) {
    check(group != 0 && group % 32 == 0, "a group is not a multiple of 32 columns");
    IntWeight weight;
    weight.out_features = out_features;
    weight.group = group;
    weight.groups = (in_features + group - 1) / group;
    const std::size_t tiles = (out_features + kTileRows - 1) / kTileRows, lines = weight.groups * group * std::size_t(bits) / 32;
    check(codes.shape(0) == tiles && codes.shape(1) == lines && codes.shape(2) == kLineBytes, "codes are not [tiles, lines, 64]");
    weight.codes = codes.data();
    weight.code_stride = tile_stride(codes, tiles, kLineBytes);
    if (is_bfloat16(scales.dtype())) {
        weight.scale_layout = ScaleLayout::groups_bfloat16;
        check(scales.size() == tiles * ((weight.groups + 1) / 2) * kTileRows * 2, "scales are not [tiles, pairs of groups, 16, 2]");
    } else {
        check(is_float32(scales.dtype()), "scales are bfloat16 or float32");
        weight.scale_layout = scales.ndim() == 2 ? ScaleLayout::channel : ScaleLayout::groups_float32;
        const std::size_t per_tile = scales.ndim() == 2 ? kTileRows : weight.groups * kTileRows;
        check(scales.size() == tiles * per_tile, "scales are not [tiles, 16] or [tiles, groups, 16]");
    }
    weight.scales = scales.data();
    weight.scale_stride = tile_stride(scales, tiles, kLineBytes);
    if (zeros) {
        const std::size_t groups = weight.scale_layout == ScaleLayout::channel ? 1 : weight.groups;
        check(zeros->shape(1) == groups && zeros->shape(2) == kTileRows, "zeros are not [tiles, groups, 16]");
        weight.zeros = zeros->data();
        weight.zero_stride = tile_stride(*zeros, tiles, 1);
    }
    return make_int_linear(weight, {bits, in_features, range, static_scale, instruction_set});
}

std::unique_ptr<Linear> dense_linear(const nb::ndarray<nb::ndim<2>, nb::device::cpu, nb::ro> &weight, const std::string &instruction_set) {
    check(weight.stride(1) == 1 || weight.shape(1) == 1, "the columns of the weight are not next to each other");
    check(weight.stride(0) >= 0 && weight.shape(1) != 0, "the weight has no columns, or its rows run backwards");
    const DenseWeight dense{weight.data(), type_of(weight.dtype()) == Type::bfloat16, weight.shape(1), std::size_t(weight.stride(0))};
    return make_dense_linear(dense, weight.shape(0), instruction_set);
}

// A tensor, by way of DLPack, that owns its part of the memory for weights.
nb::ndarray<std::uint8_t, nb::ndim<1>, nb::device::cpu> weight_bytes(std::size_t bytes) {
    auto owner = std::make_unique<std::shared_ptr<void>>(weight_memory(bytes));
    void *data = owner->get();
    nb::capsule capsule(owner.get(), [](void *held) noexcept { delete static_cast<std::shared_ptr<void> *>(held); });
    owner.release();
    return {data, {bytes}, capsule};
}

template <typename Value> Value named(const std::string &name, std::initializer_list<std::pair<const char *, Value>> values, const char *message) {
    for (const auto &[known, value] : values) {
        if (name == known) return value;
    }
    throw std::invalid_argument(message);
}

std::unique_ptr<Linear> digit_linear(const Array<const std::uint8_t, 2> &tiles, std::size_t out_features, std::size_t in_features,
                                     const std::string &format, const std::string &scale_type, bool affine, std::size_t block,
                                     std::size_t blocks, float factor, const std::string &instruction_set) {
    DigitWeight weight;
    weight.data = tiles.data();
    weight.out = out_features;
    weight.in = in_features;
    weight.format = named<DigitFormat>(format, {{"int8", DigitFormat::int8}, {"int4", DigitFormat::int4}, {"int3", DigitFormat::int3},
                                                {"int2", DigitFormat::int2}, {"e2m1", DigitFormat::e2m1}}, "no such format");
    weight.scale_type = named<ScaleType>(scale_type, {{"float32", ScaleType::float32}, {"bfloat16", ScaleType::bfloat16},
                                                      {"e8m0", ScaleType::e8m0}, {"e4m3", ScaleType::e4m3}}, "no such scale type");
    weight.affine = affine;
    weight.block = block;
    weight.blocks = blocks;
    weight.factor = factor;
    check(block != 0 && blocks != 0, "a group has no columns");
    weight.groups = (in_features + block * blocks - 1) / (block * blocks);
    const std::size_t group_bytes = digit_header_bytes(weight.scale_type, affine) + blocks * digit_block_bytes(weight.format, block);
    check(tiles.shape(0) == (out_features + kTile - 1) / kTile && tiles.shape(1) == weight.groups * group_bytes,
          "the tiles have not the size that the format and the shape ask for");
    check(reinterpret_cast<std::uintptr_t>(tiles.data()) % 64 == 0, "the tiles do not begin on a cache line");
    return make_digit_linear(weight, instruction_set);
}

std::unique_ptr<Linear> table_linear(const Array<const std::uint8_t, 2> &tiles, std::size_t out_features, std::size_t in_features,
                                     const std::string &format, bool bfloat16_scales, std::size_t group,
                                     const std::optional<Array<const float, 1>> &table, const std::string &instruction_set) {
    TableWeight weight;
    weight.data = tiles.data();
    weight.out = out_features;
    weight.in = in_features;
    weight.format = named<TableFormat>(
        format, {{"table16", TableFormat::table16}, {"e4m3", TableFormat::e4m3}, {"e5m2", TableFormat::e5m2}}, "no such format");
    weight.bfloat16_scales = bfloat16_scales;
    weight.group = group;
    check(group != 0, "a group has no columns");
    weight.groups = (in_features + group - 1) / group;
    check(!table || table->shape(0) == 16, "a table has 16 entries");
    weight.table = table ? table->data() : nullptr;
    check(tiles.shape(0) == (out_features + kTableTile - 1) / kTableTile && tiles.shape(1) == table_tile_bytes(weight),
          "the tiles have not the size that the format and the shape ask for");
    return make_table_linear(weight, instruction_set);
}

} // namespace

void bind_cpu(nb::module_ &m) {
    m.def("threads", &threads, "Threads of the CPU kernels.");
    m.def("set_threads", &set_threads, "count"_a, nb::call_guard<nb::gil_scoped_release>(), "Replace the threads of the CPU kernels.");
    m.def("int_instruction_sets", &int_instruction_sets, "Instruction sets for integer products on this CPU, the best first.");

    m.def("float_instruction_sets", &float_instruction_sets, "Instruction sets for float products on this CPU, the best first.");
    m.def("multiply_in_turn", &multiply_all, "linears"_a, "x"_a, "y"_a);

    nb::class_<Linear>(m, "Linear", nb::is_weak_referenceable())
        .def_prop_ro("out_features", [](const Linear &linear) { return linear.out_features; })
        .def_prop_ro("in_features", [](const Linear &linear) { return linear.in_features; })
        .def_prop_ro("tile", &Linear::tile)
        .def_prop_ro("bytes", &Linear::bytes)
        .def("apply", &apply_linear, "x"_a, "y"_a, "bias"_a.none() = nb::none());
    m.def("int_linear", &int_linear, "codes"_a, "scales"_a, "zeros"_a.none(), "out_features"_a, "in_features"_a, "group"_a, "bits"_a,
          "range"_a = 127.0f, "static_scale"_a = 0.0f, "instruction_set"_a = "", nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(),
          nb::keep_alive<0, 3>());
    m.def("digit_instruction_sets", &digit_instruction_sets, "Instruction sets for exact integer products on this CPU, the best first.");
    m.def("digit_linear", &digit_linear, "tiles"_a, "out_features"_a, "in_features"_a, "format"_a, "scale_type"_a, "affine"_a, "block"_a,
          "blocks"_a, "factor"_a = 1.0f, "instruction_set"_a = "", nb::keep_alive<0, 1>());
    m.def("table_linear", &table_linear, "tiles"_a, "out_features"_a, "in_features"_a, "format"_a, "bfloat16_scales"_a, "group"_a,
          "table"_a.none() = nb::none(), "instruction_set"_a = "", nb::keep_alive<0, 1>());
    m.def("dense_linear", &dense_linear, "weight"_a, "instruction_set"_a = "", nb::keep_alive<0, 1>());
    m.def("weight_memory", &weight_bytes, "bytes"_a);
    bind_rows(m);
}

} // namespace fewbit
