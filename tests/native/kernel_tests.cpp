// The kernels of every instruction set that this CPU has against the portable ones, without Python: a program that runs under an emulator of
// another architecture (tests/native/test_arm.py) and under sanitizers (scripts/sanitize.py).
//
// Each family is multiplied twice. Inputs that are small integers and scales that are powers of two make every step exact: the results have to
// be equal to the last bit, and what lies around them has to be left alone. Inputs from a normal distribution may differ by rounding.
//
// Prints the instruction sets and the number of cases of each family; ends with 1 when one of them differs.

#include "apply.hpp"
#include "dense.hpp"
#include "digit_linear.hpp"
#include "digits.hpp"
#include "int_linear.hpp"
#include "prepare.hpp"
#include "row_kernels.hpp"
#include "table_linear.hpp"
#include "thread_pool.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

using namespace fewbit;

namespace {

constexpr float kUntouched = 12345.0f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::mt19937 random_bits(1);
int cases = 0, failures = 0;

int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }
std::size_t size(int low, int high) { return std::size_t(integer(low, high)); }

// Memory that begins on a cache line.
class Bytes {
  public:
    explicit Bytes(std::size_t count) : memory_(count + 2 * 64), count_(count) {}
    std::uint8_t *data() { return memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64) % 64; }
    std::size_t size() const { return count_; }
    template <typename T> T *as() { return reinterpret_cast<T *>(data()); }
    Bytes &fill(const std::function<int()> &byte) {
        for (std::size_t i = 0; i < count_; ++i) data()[i] = std::uint8_t(byte());
        return *this;
    }

  private:
    std::vector<std::uint8_t> memory_;
    std::size_t count_;
};

int any_byte() { return integer(0, 255); }
std::uint16_t bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return std::uint16_t(bits >> 16);
}

void fail(const std::string &what) {
    ++failures;
    std::printf("FAIL %s\n", what.c_str());
}

enum class Kind { integers, extremes, normal, spoilt };
const char *name_of(Kind kind) {
    return kind == Kind::integers ? "integers" : kind == Kind::extremes ? "extremes" : kind == Kind::normal ? "normal" : "spoilt";
}

// Inputs of some tokens; in `spoilt` ones the first token has a NaN or an infinity.
std::vector<float> inputs(Kind kind, std::size_t rows, std::size_t columns, int largest) {
    std::vector<float> x(rows * columns);
    for (float &value : x) {
        value = kind == Kind::integers ? float(integer(-largest, largest)) : kind == Kind::extremes ? float(-largest) : normal();
    }
    if (kind == Kind::spoilt) x[size(0, int(columns) - 1)] = integer(0, 1) == 0 ? kNaN : -std::numeric_limits<float>::infinity();
    return x;
}

std::vector<float> product(const Linear &linear, const std::vector<float> &x, std::size_t rows) {
    const std::size_t out = linear.out_features, stride = out + 3;
    std::vector<float> y((rows + 1) * stride, kUntouched);
    PreparedInput prepared;
    prepared.reshape(linear.input_format(rows), rows, linear.in_features, 1);
    prepared.fill(Rows{x.data(), Type::float32, rows, linear.in_features, linear.in_features}, Norm{}, 0, 1);
    const std::size_t half = std::min(out, (out / 2 + linear.tile() - 1) / linear.tile() * linear.tile());
    linear.multiply(prepared.input(), y.data(), stride, 0, half);
    if (half < out) linear.multiply(prepared.input(), y.data(), stride, half, out);
    return y;
}

bool same_bits(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (a != a && b != b) || (a == 0 && b == 0); }

// `exact`: to the last bit. A spoilt token has to be spoilt in all of its outputs.
void compare(const std::string &what, const std::vector<float> &y, const std::vector<float> &expected, std::size_t out, bool exact, bool spoilt) {
    ++cases;
    const std::size_t stride = out + 3;
    for (std::size_t row = 0; row * stride < y.size(); ++row) {
        float largest = 0;
        for (std::size_t n = 0; n < out; ++n) largest = std::max(largest, std::fabs(expected[row * stride + n]));
        for (std::size_t n = 0; n < stride; ++n) {
            const float a = y[row * stride + n], b = expected[row * stride + n];
            const bool is_result = n < out && (row + 1) * stride < y.size();
            const bool near = !exact && is_result && std::fabs(a - b) <= 1e-5f * largest;
            if (spoilt && row == 0 && is_result ? std::isfinite(a) || std::isfinite(b) : !near && !same_bits(a, b)) {
                char text[160];
                std::snprintf(text, sizeof text, ": row %zu, output %zu of %zu: %.9g, portable %.9g", row, n, out, double(a), double(b));
                return fail(what + text);
            }
        }
    }
}

// One weight on all instruction sets.
void compare_sets(const std::string &what, const std::vector<std::string> &sets, const std::function<std::unique_ptr<Linear>(const std::string &)> &make,
                  Kind kind, std::size_t rows, int largest) {
    const auto portable = make("portable");
    const std::vector<float> x = inputs(kind, rows, portable->in_features, largest), expected = product(*portable, x, rows);
    for (const std::string &set : sets) {
        if (set == "portable") continue;
        const auto linear = make(set);
        const std::string label = what + ", " + set + ", " + name_of(kind) + ", " + std::to_string(rows) + " tokens, " +
                                  std::to_string(linear->out_features) + " x " + std::to_string(linear->in_features);
        compare(label, product(*linear, x, rows), expected, linear->out_features, kind == Kind::integers || kind == Kind::extremes,
                kind == Kind::spoilt);
    }
}

const std::size_t kRows[] = {1, 2, 3, 4, 5, 8, 11, 13, 18, 27};
const Kind kKinds[] = {Kind::integers, Kind::extremes, Kind::normal, Kind::spoilt};

// ------------------------------------------------------------------------------------------------------ INT8 activations

void int_case(int bits, ScaleLayout layout, bool affine, Kind kind, std::size_t rows) {
    IntWeight w;
    const bool whole_rows = layout == ScaleLayout::channel && integer(0, 1) == 1; // W8A8: one group of inputs
    w.out_features = size(1, 40);
    w.group = 32 * size(1, whole_rows ? 8 : 4);
    w.groups = whole_rows ? 1 : size(1, 4);
    w.scale_layout = layout;
    const std::size_t in = w.group * w.groups - (layout == ScaleLayout::channel ? size(0, 31) : 0);
    const std::size_t tiles = (w.out_features + kTileRows - 1) / kTileRows, per_tile = layout == ScaleLayout::channel ? 1 : w.groups;
    const bool extreme = kind == Kind::extremes;
    const int ends = integer(0, 1) * 255;
    w.code_stride = w.groups * w.group * kTileRows * std::size_t(bits) / 8 + 64 * size(0, 2);
    w.scale_stride = (layout == ScaleLayout::groups_bfloat16 ? (per_tile + 1) / 2 : per_tile) * kTileRows * 4 + 64 * size(0, 2);
    w.zero_stride = per_tile * kTileRows + size(0, 5);
    Bytes codes(tiles * w.code_stride), scales(tiles * w.scale_stride), zeros(tiles * w.zero_stride);
    codes.fill([&] { return extreme ? ends : any_byte(); });
    const int half = 1 << (bits - 1);
    zeros.fill([&] { return extreme ? (ends == 0 ? half - 1 : -half) : integer(-half, half - 1); });
    for (std::size_t i = 0; i < scales.size() / 4; ++i) {
        const auto scale = [&] { return extreme ? 1.0f : std::ldexp(1.0f, integer(-1, 1)); };
        if (layout == ScaleLayout::groups_bfloat16) {
            scales.as<std::uint16_t>()[2 * i] = bfloat16(scale());
            scales.as<std::uint16_t>()[2 * i + 1] = bfloat16(scale());
        } else {
            scales.as<float>()[i] = scale();
        }
    }
    w.codes = codes.data();
    w.scales = scales.data();
    w.zeros = affine ? zeros.as<std::int8_t>() : nullptr;
    const bool exact = kind == Kind::integers || extreme;
    const auto make = [&](const std::string &set) { return make_int_linear(w, {bits, in, 127.0f, exact ? 1.0f : 0.0f, set}); };
    compare_sets("INT" + std::to_string(bits) + (affine ? " affine" : ""), int_instruction_sets(), make, kind, rows, extreme ? 128 : 127);
}

void int_cases() {
    for (int bits : {2, 3, 4, 8}) {
        for (ScaleLayout layout : {ScaleLayout::channel, ScaleLayout::groups_float32, ScaleLayout::groups_bfloat16}) {
            for (bool affine : {false, true}) {
                for (Kind kind : kKinds) {
                    for (int i = 0; i < 3; ++i) int_case(bits, layout, affine, kind, kRows[integer(0, 9)]);
                }
            }
        }
        for (std::size_t rows = 1; rows < 30; ++rows) int_case(bits, ScaleLayout::groups_bfloat16, false, Kind::integers, rows);
    }
}

// ------------------------------------------------------------------------------------------------------ exact products

void digit_case(DigitFormat format, ScaleType scale_type, bool affine, Kind kind, std::size_t rows) {
    DigitWeight w;
    w.format = format;
    w.scale_type = scale_type;
    w.affine = affine;
    w.out = size(1, 130);
    w.block = (format == DigitFormat::int3 ? 32 : 16) * size(1, format == DigitFormat::int3 ? 4 : 8);
    w.blocks = size(1, 2);
    w.groups = size(1, 2);
    w.in = w.block * w.blocks * w.groups - size(0, 15);
    const std::size_t tiles = (w.out + kTile - 1) / kTile, header = digit_header_bytes(scale_type, affine);
    const std::size_t group_bytes = header + w.blocks * digit_block_bytes(format, w.block), zeros = affine ? kTile : 0;
    const int ends = integer(0, 1) * 255, largest_zero = format == DigitFormat::int8 ? 255 : format == DigitFormat::int4 ? 15 : format == DigitFormat::int3 ? 7 : 3;
    Bytes data(tiles * w.groups * group_bytes);
    data.fill([&] { return kind == Kind::extremes ? ends : any_byte(); });
    for (std::size_t g = 0; g < tiles * w.groups; ++g) {
        std::uint8_t *at = data.data() + g * group_bytes;
        for (std::size_t i = 0; i < kTile; ++i) {
            const float scale = std::ldexp(1.0f, integer(-1, 1));
            const std::uint16_t half = bfloat16(scale);
            if (scale_type == ScaleType::float32) std::memcpy(at + 4 * i, &scale, 4);
            else if (scale_type == ScaleType::bfloat16) std::memcpy(at + 2 * i, &half, 2);
            else if (scale_type == ScaleType::e8m0) at[i] = std::uint8_t(integer(126, 128));
            else at[i] = std::uint8_t(8 * integer(5, 9)); // powers of two of E4M3
            if (affine) at[header - zeros + i] = std::uint8_t(integer(0, largest_zero));
        }
    }
    w.data = data.data();
    w.factor = integer(0, 1) == 0 ? 1.0f : 0.5f;
    const auto make = [&](const std::string &set) { return make_digit_linear(w, set); };
    compare_sets("exact, format " + std::to_string(int(format)) + (affine ? " affine" : ""), digit_instruction_sets(), make, kind, rows, 8);
}

void digit_cases() {
    for (DigitFormat format : {DigitFormat::int8, DigitFormat::int4, DigitFormat::int3, DigitFormat::int2, DigitFormat::e2m1}) {
        for (ScaleType scale : {ScaleType::float32, ScaleType::bfloat16, ScaleType::e8m0, ScaleType::e4m3}) {
            const bool is_fp4 = format == DigitFormat::e2m1;
            if (!is_fp4 && (scale == ScaleType::e8m0 || scale == ScaleType::e4m3)) continue;
            for (Kind kind : kKinds) {
                for (int i = 0; i < 3; ++i) digit_case(format, scale, !is_fp4 && i % 2 == 1, kind, kRows[integer(0, 6)]);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------ tables, dense

void table_case(TableFormat format, bool bfloat16_scales, Kind kind, std::size_t rows) {
    TableWeight w;
    w.format = format;
    w.bfloat16_scales = bfloat16_scales;
    w.out = size(1, 130);
    w.group = 8 * size(1, 12);
    w.groups = size(1, 4);
    w.in = w.group * w.groups - (format == TableFormat::table16 ? 0 : size(0, 7));
    std::vector<float> table(16);
    for (float &entry : table) entry = float(integer(-8, 8));
    w.table = table.data();
    const std::size_t tiles = (w.out + kTableTile - 1) / kTableTile, tile_bytes = table_tile_bytes(w), scale_bytes = bfloat16_scales ? 2 : 4;
    Bytes data(tiles * tile_bytes);
    // FP8 without infinities and NaN; for exact sums numbers of 1/2 to 3.75 and their negatives.
    data.fill([&] {
        if (format == TableFormat::table16) return any_byte();
        const int exponent_one = format == TableFormat::e4m3 ? 0x38 : 0x3c, step = format == TableFormat::e4m3 ? 8 : 4;
        const int some = kind == Kind::normal || kind == Kind::spoilt ? integer(0, 0x7b) : exponent_one + integer(-step, 2 * step - 1);
        return some | integer(0, 1) << 7;
    });
    for (std::size_t g = 0; g < tiles * w.groups; ++g) {
        for (std::size_t i = 0; i < kTableTile; ++i) {
            const float scale = std::ldexp(1.0f, integer(-1, 1));
            const std::uint16_t half = bfloat16(scale);
            std::uint8_t *at = data.data() + g * (tile_bytes / w.groups) + i * scale_bytes;
            if (bfloat16_scales) std::memcpy(at, &half, 2);
            else std::memcpy(at, &scale, 4);
        }
    }
    w.data = data.data();
    const auto make = [&](const std::string &set) { return make_table_linear(w, set); };
    compare_sets("table, format " + std::to_string(int(format)), float_instruction_sets(), make, kind, rows, 8);
}

// Every FP8 code, read out by an input of one column: the bits that the portable decoder gives.
void fp8_codes(TableFormat format) {
    TableWeight w;
    w.format = format;
    w.out = 256;
    w.in = w.group = 1;
    w.groups = 1;
    Bytes data(4 * table_tile_bytes(w));
    for (int code = 0; code < 256; ++code) {
        std::uint8_t *tile = data.data() + std::size_t(code) / 64 * table_tile_bytes(w);
        const float one = 1.0f;
        std::memcpy(tile + code % 64 * 4, &one, 4);
        tile[64 * 4 + code % 64] = std::uint8_t(code);
    }
    w.data = data.data();
    for (std::size_t rows : {std::size_t(1), std::size_t(20)}) {
        const std::vector<float> x(rows, 1.0f), expected = product(*make_table_linear(w, "portable"), x, rows);
        for (const std::string &set : float_instruction_sets()) {
            compare("FP8 codes, " + set, product(*make_table_linear(w, set), x, rows), expected, 256, true, false);
        }
    }
}

void table_cases() {
    const std::size_t rows[] = {1, 2, 3, 4, 7, 16, 17, 23, 40};
    for (TableFormat format : {TableFormat::table16, TableFormat::e4m3, TableFormat::e5m2}) {
        for (Kind kind : kKinds) {
            for (std::size_t count : rows) table_case(format, count % 2 == 0, kind, count);
        }
        if (format != TableFormat::table16) fp8_codes(format);
    }
}

void dense_case(bool narrow, Kind kind, std::size_t rows) {
    const std::size_t out = size(1, 70), in = size(1, 300), stride = in + size(0, 3);
    Bytes data(out * stride * 4);
    for (std::size_t i = 0; i < out * stride; ++i) {
        const float value = kind == Kind::normal || kind == Kind::spoilt ? normal() : float(integer(-8, 8));
        if (narrow) data.as<std::uint16_t>()[i] = bfloat16(value);
        else data.as<float>()[i] = value;
    }
    const DenseWeight w{data.data(), narrow, in, stride};
    const auto make = [&](const std::string &set) { return make_dense_linear(w, out, set); };
    compare_sets(narrow ? "BF16" : "float32", float_instruction_sets(), make, kind, rows, 8);
}

void dense_cases() {
    for (bool narrow : {false, true}) {
        for (Kind kind : kKinds) {
            for (std::size_t rows : {1, 2, 3, 4, 6, 16, 17, 25, 40}) dense_case(narrow, kind, rows);
        }
    }
}

// ------------------------------------------------------------------------------------------------------ rows of activations

std::vector<float> row(std::size_t count) {
    std::vector<float> x(count);
    const float scale = std::ldexp(1.0f, integer(-120, 120));
    for (float &value : x) value = normal() * scale;
    const float odd[] = {kNaN, -std::numeric_limits<float>::infinity(), 0.0f, 1e-44f, -0.0f, 3e38f};
    if (integer(0, 2) == 0) x[size(0, int(count) - 1)] = odd[integer(0, 5)];
    return x;
}

template <typename T> bool equal(const std::vector<T> &a, const std::vector<T> &b) { return std::equal(a.begin(), a.end(), b.begin()); }
bool equal(const std::vector<float> &a, const std::vector<float> &b) { return std::equal(a.begin(), a.end(), b.begin(), same_bits); }

void row_case(const RowKernels &kernels) {
    ++cases;
    const RowKernels &portable = row_kernels_portable();
    const std::size_t count = size(1, 150), padded = count + size(0, 40);
    const std::vector<float> x = row(count), weight = row(count);
    const float steps[] = {0.0f, 0.0f, 0.01f, 1e-38f}, step = steps[integer(0, 3)];
    std::vector<std::int8_t> codes(padded, 77), portable_codes(padded, 77);
    float scale = 0, portable_scale = 0;
    const std::int32_t sum = kernels.quantize(x.data(), count, padded, 127.5f, step, codes.data(), &scale);
    if (sum != portable.quantize(x.data(), count, padded, 127.5f, step, portable_codes.data(), &portable_scale) ||
        !same_bits(scale, portable_scale) || !equal(codes, portable_codes)) {
        fail(std::string("quantize, ") + kernels.name);
    }
    if (!same_bits(kernels.sum_of_squares(x.data(), count), portable.sum_of_squares(x.data(), count))) fail(std::string("sum_of_squares, ") + kernels.name);
    for (bool round : {false, true}) {
        std::vector<float> y(count + 1, kUntouched), expected(count + 1, kUntouched);
        kernels.normalize(x.data(), weight.data(), 0.37f, round, y.data(), count);
        portable.normalize(x.data(), weight.data(), 0.37f, round, expected.data(), count);
        if (!equal(y, expected)) fail(std::string("normalize, ") + kernels.name);
    }
    std::vector<std::uint16_t> narrow(count);
    for (std::size_t i = 0; i < count; ++i) narrow[i] = bfloat16(x[i]);
    std::vector<float> wide(count + 1, kUntouched), expected(count + 1, kUntouched);
    kernels.widen(narrow.data(), wide.data(), count);
    portable.widen(narrow.data(), expected.data(), count);
    if (!equal(wide, expected)) fail(std::string("widen, ") + kernels.name);
}

void row_cases() {
    for (const RowKernels *kernels : row_kernels_available()) {
        for (int i = 0; i < 300; ++i) row_case(*kernels);
    }
    for (int i = 0; i < 200; ++i) {
        ++cases;
        const std::size_t count = size(1, 128), block = (count + 15) / 16 * 16;
        const std::vector<float> x = row(count);
        std::vector<std::int8_t> codes(3 * block), portable_codes(3 * block);
        std::vector<std::int32_t> sums(3), portable_sums(3);
        float scale = 0, portable_scale = 0;
        split_digits()(x.data(), count, block, codes.data(), block, &scale, sums.data(), 1);
        portable::kSplitDigits(x.data(), count, block, portable_codes.data(), block, &portable_scale, portable_sums.data(), 1);
        if (!same_bits(scale, portable_scale) || !equal(codes, portable_codes) || !equal(sums, portable_sums)) fail("split_digits");
    }
}

// ------------------------------------------------------------------------------------------------------ threads

void thread_cases() {
    const std::size_t out = 200, in = 128, rows = 9;
    std::vector<float> weight(out * in), bias(out);
    for (float &value : weight) value = normal();
    for (float &value : bias) value = float(integer(-8, 8));
    const auto linear = make_dense_linear(DenseWeight{weight.data(), false, in, in}, out, "");
    const std::vector<float> x = inputs(Kind::normal, rows, in, 0);
    std::vector<float> alone(rows * out);
    const Rows all{x.data(), Type::float32, rows, in, in};
    set_threads(1);
    apply(*linear, all, alone.data(), Type::float32, out, bias.data());
    for (std::size_t threads : {2, 3, 5}) {
        set_threads(threads);
        for (int i = 0; i < 20; ++i) {
            ++cases;
            std::vector<float> together(rows * out);
            apply(*linear, all, together.data(), Type::float32, out, bias.data());
            if (!equal(together, alone)) fail(std::to_string(threads) + " threads");
        }
    }
    set_threads(1);
}

std::string joined(const std::vector<std::string> &names) {
    std::string all;
    for (const std::string &name : names) all += (all.empty() ? "" : " ") + name;
    return all;
}

void run(const char *family, const std::string &sets, void (*all)()) {
    const int before = cases;
    all();
    std::printf("%s: %s: %d cases\n", family, sets.c_str(), cases - before);
}

} // namespace

int main() {
    std::vector<std::string> rows;
    for (const RowKernels *kernels : row_kernels_available()) rows.emplace_back(kernels->name);
    run("rows", joined(rows), row_cases);
    run("int8-activations", joined(int_instruction_sets()), int_cases);
    run("exact", joined(digit_instruction_sets()), digit_cases);
    run("tables", joined(float_instruction_sets()), table_cases);
    run("dense", joined(float_instruction_sets()), dense_cases);
    run("threads", "5", thread_cases);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
