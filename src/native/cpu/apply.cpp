#include "apply.hpp"

#include "thread_pool.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace fewbit {
namespace {

constexpr std::size_t kRows = 2048;             // tokens that are prepared at once
constexpr std::size_t kResultBytes = 256 << 10; // of a thread in float32: they stay in the cache until they are rounded

std::uint16_t to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return std::uint16_t(bits >> 16 | 0x40); // a NaN stays one
    return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Output {
    void *data;
    Type type;
    std::size_t stride;
    const float *bias;
};

// Results of features [begin, end) that lie in `from`, [rows, end - begin], go to `y`.
void store(const float *from, std::size_t rows, std::size_t begin, std::size_t end, const Output &y, std::size_t first_row) {
    const std::size_t count = end - begin;
    for (std::size_t m = 0; m < rows; ++m, from += count) {
        const std::size_t at = (first_row + m) * y.stride + begin;
        const float *bias = y.bias == nullptr ? nullptr : y.bias + begin;
        if (y.type == Type::float32) {
            float *to = static_cast<float *>(y.data) + at;
            for (std::size_t i = 0; i < count; ++i) to[i] = bias == nullptr ? from[i] : from[i] + bias[i];
        } else {
            std::uint16_t *to = static_cast<std::uint16_t *>(y.data) + at;
            for (std::size_t i = 0; i < count; ++i) to[i] = to_bfloat16(bias == nullptr ? from[i] : from[i] + bias[i]);
        }
    }
}

} // namespace

void apply(const Linear &linear, const Rows &x, void *y, Type y_type, std::size_t y_stride, const float *bias) {
    static std::mutex one_at_a_time; // the buffers below are shared
    static PreparedInput &prepared = *new PreparedInput;
    static AlignedBuffer &results = *new AlignedBuffer;
    std::lock_guard<std::mutex> lock(one_at_a_time);

    ThreadPool &threads = pool();
    const Output output{y, y_type, y_stride, bias};
    for (std::size_t first = 0; first < x.rows; first += kRows) {
        Rows part = x;
        part.rows = std::min(kRows, x.rows - first);
        part.data = static_cast<const char *>(x.data) + first * x.stride * (x.type == Type::float32 ? 4 : 2);
        const std::size_t cached = kResultBytes / (part.rows * sizeof(float)) / linear.tile() * linear.tile();
        const std::size_t most = std::min(linear.out_features, std::max(linear.tile(), cached));
        prepared.reshape(linear.input_format(part.rows), part.rows, x.columns, threads.threads());
        results.reserve(threads.threads() * part.rows * most * sizeof(float));
        Ranges ranges(linear.out_features, linear.tile(), threads.threads(), most);
        threads.run([&](std::size_t thread) {
            prepared.fill(part, Norm{}, thread, threads.threads());
            threads.barrier(thread);
            float *own = static_cast<float *>(results.data()) + thread * part.rows * most;
            for (std::size_t begin = 0, end = 0; ranges.take(begin, end);) {
                linear.multiply(prepared.input(), own - begin, end - begin, begin, end);
                store(own, part.rows, begin, end, output, first);
            }
        });
    }
}

} // namespace fewbit
