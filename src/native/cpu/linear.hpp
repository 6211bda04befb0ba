// The interface between weights and whoever multiplies with them: the decode engine and Python.
//
// A format is a subclass of Linear. It says how it wants its inputs (`input_format`); the caller prepares them once (prepare.hpp) for all
// linears that read the same activations, q, k and v for instance, and then lets each thread multiply its share of the output features. So
// neither the engine nor Python knows about formats. Only plain data here: this header is included by files compiled for single instruction
// sets, and an inline function would be one function for all of them.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

enum class InputKind { float32, int8_groups, int24_groups };

struct InputFormat {
    InputKind kind = InputKind::float32;
    // int8_groups, int24_groups: columns that share a scale, a multiple of 8 (int24: 16). The last group of a row may be short: its codes are
    // padded with zeros.
    std::size_t group = 0;
    float range = 127.0f;      // the largest magnitude of a group is mapped to it: scale = max |x| / range
    float static_scale = 0.0f; // W8A8 with calibrated inputs: the one scale; 0: scales are computed from the values
};

// Activations of `rows` tokens in one format. Groups of a row: ceil(columns / group).
struct Input {
    InputFormat format;
    std::size_t rows = 0, columns = 0;
    const float *values = nullptr;       // float32: [rows, columns], rows `stride` values apart
    std::size_t stride = 0;
    const std::int8_t *codes = nullptr;  // int8_groups: [rows, groups * group]; 64 bytes and more may be read behind the last.
                                         // int24_groups (digits.hpp): [rows, 3, groups * group], and sums [rows, 3, groups]
    std::size_t code_stride = 0;         // bytes from one row of codes (int24: of digits) to the next: an odd number of cache lines, or rows
                                         // share cache sets
    const float *scales = nullptr;       // [rows, groups]; NaN where a value of the group is NaN or infinite
    const std::int32_t *sums = nullptr;  // [rows, groups], of the codes
    const std::int32_t *starts = nullptr; // [rows, groups], -8 * sums: where the sums of unsigned INT4 codes with offset 8 start
    std::size_t groups = 0;              // int8_groups, int24_groups
};

// One weight [out_features, in_features] in its packed form. The bytes belong to somebody else, who keeps them as long as the object.
class Linear {
  public:
    Linear(std::size_t out, std::size_t in) : out_features(out), in_features(in) {}
    virtual ~Linear() = default;

    const std::size_t out_features, in_features;

    // How the inputs of `rows` tokens have to be prepared.
    virtual InputFormat input_format(std::size_t rows) const = 0;

    // `begin` and `end` of `multiply` are multiples of it, or out_features.
    virtual std::size_t tile() const = 0;

    // Read per pass at one token.
    virtual std::size_t bytes() const = 0;

    // y[m * y_stride + n] = sum_k x[m, k] * W[n, k] for n in [begin, end), on the calling thread. `x` is in input_format(x.rows). What is
    // outside of [begin, end) is not touched. Does not throw.
    virtual void multiply(const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) const = 0;
};

} // namespace fewbit
