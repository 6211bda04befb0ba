#include "permute.hpp"

#include <algorithm>
#include <thread>
#include <vector>

namespace fewbit {
namespace {

// Rows that are walked together: one cache line of each transposed column. The source rows of a strip stay in the second-level cache.
constexpr std::size_t kStrip = 32;

// Calls work(first, count) for strips of rows, split evenly over threads.
template <typename Work>
void for_strips(std::size_t rows, std::size_t threads, const Work &work) {
    const std::size_t strips = (rows + kStrip - 1) / kStrip;
    threads = std::max<std::size_t>(1, std::min(threads, strips));
    const auto run = [&](std::size_t part) {
        for (std::size_t strip = strips * part / threads; strip < strips * (part + 1) / threads; ++strip)
            work(strip * kStrip, std::min(kStrip, rows - strip * kStrip));
    };
    std::vector<std::thread> others;
    for (std::size_t part = 1; part < threads; ++part) others.emplace_back(run, part);
    run(0);
    for (auto &other : others) other.join();
}

}  // namespace

void gather_transposed(const float *in, std::size_t stride, const std::int64_t *rows, std::size_t row_count, const std::int64_t *columns,
                       std::size_t column_count, float *out, std::size_t threads) {
    for_strips(row_count, threads, [&](std::size_t first, std::size_t count) {
        const float *source[kStrip];
        for (std::size_t i = 0; i < count; ++i) source[i] = in + (rows == nullptr ? first + i : std::size_t(rows[first + i])) * stride;
        for (std::size_t k = 0; k < column_count; ++k) {
            const std::size_t column = std::size_t(columns[k]);
            float *to = out + k * row_count + first;
            for (std::size_t i = 0; i < count; ++i) to[i] = source[i][column];
        }
    });
}

void scatter_transposed(const float *in, std::size_t stride, std::size_t first_row, std::size_t row_count, const std::int64_t *columns,
                        std::size_t column_count, float *out, std::size_t threads) {
    for_strips(row_count, threads, [&](std::size_t first, std::size_t count) {
        float *to = out + first * column_count;
        for (std::size_t k = 0; k < column_count; ++k) {
            const float *from = in + k * stride + first_row + first;
            const std::size_t column = std::size_t(columns[k]);
            for (std::size_t i = 0; i < count; ++i) to[i * column_count + column] = from[i];
        }
    });
}

}  // namespace fewbit
