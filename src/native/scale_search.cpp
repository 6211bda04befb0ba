#include "scale_search.hpp"

#include <algorithm>
#include <limits>
#include <thread>
#include <vector>

// One source for every instruction set: the compiler vectorizes over the lanes, the loader picks the clone that the CPU runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FEWBIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FEWBIT_CLONES
#endif

namespace fewbit {
namespace {

constexpr std::size_t kLanes = 16;
// Adding and subtracting 1.5 * 2^23 rounds a float of less than 2^22 to the nearest integer, ties to even.
constexpr float kRounder = 12582912.0f;

// For the codes q of one group at a scale s, with d = w - q s: <d, d>, <q, d> and <q, q> under the importance. Differences and not <q, w>
// and <w, w>, whose float32 sums would hide the error of eight bits.
struct Sums {
    float error, projection, norm;
};

inline float total(const float *lanes) {
    float sum = 0.0f;
    for (std::size_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
}

FEWBIT_CLONES Sums sums_of(const float *w, const float *h, std::size_t count, float scale, float low, float high) {
    float error[kLanes] = {}, projection[kLanes] = {}, norm[kLanes] = {};
    const float inverse = 1.0f / scale;
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            float q = w[i + lane] * inverse;
            q = q < low ? low : q;
            q = q > high ? high : q;
            q = (q + kRounder) - kRounder;
            const float d = w[i + lane] - q * scale, weighted = d * h[i + lane];
            error[lane] += weighted * d;
            projection[lane] += weighted * q;
            norm[lane] += q * q * h[i + lane];
        }
    }
    for (std::size_t lane = 0; i < count; ++i, ++lane) {
        float q = std::min(std::max(w[i] * inverse, low), high);
        q = (q + kRounder) - kRounder;
        const float d = w[i] - q * scale;
        error[lane] += d * d * h[i];
        projection[lane] += q * d * h[i];
        norm[lane] += q * q * h[i];
    }
    return {total(error), total(projection), total(norm)};
}

FEWBIT_CLONES float error_of(const float *w, const float *h, std::size_t count, float scale, float low, float high) {
    float error[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            float q = w[i + lane] / scale;
            q = q < low ? low : q;
            q = q > high ? high : q;
            q = (q + kRounder) - kRounder;
            const float difference = q * scale - w[i + lane];
            error[lane] += difference * difference * h[i + lane];
        }
    }
    for (std::size_t lane = 0; i < count; ++i, ++lane) {
        float q = std::min(std::max(w[i] / scale, low), high);
        q = (q + kRounder) - kRounder;
        error[lane] += (q * scale - w[i]) * (q * scale - w[i]) * h[i];
    }
    return total(error);
}

// Calls work(row) for all rows, split evenly over threads.
template <typename Work>
void for_rows(std::size_t rows, std::size_t threads, const Work &work) {
    threads = std::max<std::size_t>(1, std::min(threads, rows));
    const auto run = [&](std::size_t part) {
        for (std::size_t row = rows * part / threads; row < rows * (part + 1) / threads; ++row) work(row);
    };
    std::vector<std::thread> others;
    for (std::size_t part = 1; part < threads; ++part) others.emplace_back(run, part);
    run(0);
    for (auto &other : others) other.join();
}

std::vector<float> importance_or_ones(const Groups &groups) {
    if (groups.importance == nullptr) return std::vector<float>(groups.columns, 1.0f);
    return std::vector<float>(groups.importance, groups.importance + groups.columns);
}

}  // namespace

void least_squares_scales(const Groups &groups, const float *start, const float *factors, std::size_t factor_count, float *scale,
                          std::size_t threads) {
    const std::vector<float> importance = importance_or_ones(groups);
    const std::size_t per_row = groups.columns / groups.group;
    for_rows(groups.rows, threads, [&](std::size_t row) {
        for (std::size_t g = 0; g < per_row; ++g) {
            const float *w = groups.weight + row * groups.columns + g * groups.group;
            const float *h = importance.data() + g * groups.group;
            const float first = start[row * per_row + g];
            float best = std::numeric_limits<float>::infinity(), found = first;
            for (std::size_t j = 0; j < factor_count; ++j) {
                const float tried = first * factors[j];
                const Sums sums = sums_of(w, h, groups.group, tried, groups.low, groups.high);
                if (!(sums.norm > 0.0f)) continue;
                const float shift = sums.projection / sums.norm, error = sums.error - sums.projection * shift;
                if (error < best) {
                    best = error;
                    found = tried + shift;
                }
            }
            scale[row * per_row + g] = found;
        }
    });
}

void squared_error(const Groups &groups, const float *scale, float *error, std::size_t threads) {
    const std::vector<float> importance = importance_or_ones(groups);
    const std::size_t per_row = groups.columns / groups.group;
    for_rows(groups.rows, threads, [&](std::size_t row) {
        for (std::size_t g = 0; g < per_row; ++g) {
            const std::size_t index = row * per_row + g;
            error[index] = error_of(groups.weight + row * groups.columns + g * groups.group, importance.data() + g * groups.group,
                                    groups.group, scale[index], groups.low, groups.high);
        }
    });
}

}  // namespace fewbit
