// The search for symmetric integer scales (fewbit/formats/scales.py) without temporaries: each group stays in the first-level cache.
#pragma once

#include <cstddef>

namespace fewbit {

// What all functions share: a [rows, columns] float32 weight whose rows are cut into groups of `group` neighbours, and one float32
// importance per column (or nullptr). Codes are round-to-nearest-even of w / scale, clamped to [low, high].
struct Groups {
    const float *weight;
    const float *importance;
    std::size_t rows, columns, group;
    float low, high;
};

// For each group, the least squares scale that leaves the least error over all starts: with q the codes at s = start[i] * factors[j] and
// d = w - q s, the scale s + <q, d> / <q, q> leaves <d, d> - <q, d>^2 / <q, q>. `scale` keeps start[i] where all codes are zero. `start` and
// `scale` are [rows, columns / group].
void least_squares_scales(const Groups &groups, const float *start, const float *factors, std::size_t factor_count, float *scale,
                          std::size_t threads);

// Importance-weighted squared error of each group at the given scales; [rows, columns / group].
void squared_error(const Groups &groups, const float *scale, float *error, std::size_t threads);

}  // namespace fewbit
