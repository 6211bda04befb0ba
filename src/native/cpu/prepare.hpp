// Activations in the form that a Linear wants, filled by the threads of a pool.
//
//     int8_groups    s = max |x| / range over a group       q = round(x / s), to even       sums: sum of a group's q
//
// A group with a NaN or an infinity gets the scale NaN, so that every output of that token is NaN: integers could not say it. A group of
// zeros gets scale 1.
//
// RMSNorm (x * rsqrt(mean x^2 + epsilon) * weight) can be applied on the way, so that normalized activations are never written in float32.

#pragma once

#include "linear.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fewbit {

enum class Type { float32, bfloat16 };

// rows x columns values, rows `stride` elements apart.
struct Rows {
    const void *data = nullptr;
    Type type = Type::float32;
    std::size_t rows = 0, columns = 0, stride = 0;
};

struct Norm {
    const float *weight = nullptr; // [columns]; null: no norm
    float epsilon = 0.0f;
    bool round = false; // round to BF16 after the division and after the weight, as a BF16 model does
};

struct RowKernels;

// Those that this CPU runs, the fastest first; the portable ones are always the last.
std::vector<const RowKernels *> row_kernels_available();

bool operator==(const InputFormat &a, const InputFormat &b);

// Memory that grows and never shrinks, aligned to cache lines; what it held is lost when it grows.
class AlignedBuffer {
  public:
    void reserve(std::size_t bytes);
    void *data() const { return memory_.get(); }

  private:
    struct Free {
        void operator()(void *memory) const;
    };
    std::unique_ptr<void, Free> memory_;
    std::size_t bytes_ = 0;
};

class PreparedInput {
  public:
    // On one thread: makes room for `fill` by at most `threads` threads. Throws std::bad_alloc, std::invalid_argument (a group that is no
    // multiple of 8).
    void reshape(const InputFormat &format, std::size_t rows, std::size_t columns, std::size_t threads);

    // On every thread of `threads`: the share of `thread`. A barrier has to follow before anybody reads `input()`. Float32 rows without a norm
    // are not copied, but referred to. Does not throw.
    void fill(const Rows &x, const Norm &norm, std::size_t thread, std::size_t threads);

    // Instead of `fill`, for a caller that has the values piece by piece: columns [first, first + count) of one row, on any thread. `first` is a
    // multiple of the group, `count`, too, or ends the row. Not for float32.
    void put(std::size_t row, std::size_t first, const float *values, std::size_t count);

    // A part of the rows, for callers that go through many tokens in blocks.
    Input rows(std::size_t begin, std::size_t count) const;
    const Input &input() const { return input_; }

  private:
    struct Part {
        std::size_t index, count;
    };

    void fill_row(const Rows &x, const Norm &norm, std::size_t row, const Part &part, float *scratch);
    void quantize(std::size_t row, std::size_t group, const float *values, std::size_t count);
    void refer(const Rows &x);

    Input input_;
    AlignedBuffer values_, codes_, scales_, sums_, starts_, scratch_;
};

} // namespace fewbit
