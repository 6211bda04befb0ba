#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

// out[k, r] = in[rows[r], columns[k]]; `rows` may be null for all in their order. in: [*, stride], out: [column_count, row_count].
void gather_transposed(const float *in, std::size_t stride, const std::int64_t *rows, std::size_t row_count, const std::int64_t *columns,
                       std::size_t column_count, float *out, std::size_t threads);

// out[r, columns[k]] = in[k, first + r]: the way back. in: [column_count, stride], out: [row_count, column_count]; `columns` is a permutation.
void scatter_transposed(const float *in, std::size_t stride, std::size_t first, std::size_t row_count, const std::int64_t *columns,
                        std::size_t column_count, float *out, std::size_t threads);

}  // namespace fewbit
