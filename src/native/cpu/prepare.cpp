#include "prepare.hpp"

#include "cpu_features.hpp"
#include "digits.hpp"
#include "row_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace fewbit {
namespace {

constexpr std::size_t kLine = 64;

const RowKernels &row_kernels() {
    static const RowKernels &chosen = *row_kernels_available().front();
    return chosen;
}

// Codes of one value.
std::size_t digits_of(const InputFormat &format) { return format.kind == InputKind::int24_groups ? 3 : 1; }

const float *row_values(const Rows &x, std::size_t row, float *scratch) {
    if (x.type == Type::float32) return static_cast<const float *>(x.data) + row * x.stride;
    row_kernels().widen(static_cast<const std::uint16_t *>(x.data) + row * x.stride, scratch, x.columns);
    return scratch;
}

} // namespace

std::vector<const RowKernels *> row_kernels_available() {
    std::vector<const RowKernels *> found;
#if defined(__x86_64__)
    if (cpu_features().avx512) found.push_back(&row_kernels_avx512());
    if (cpu_features().avx2) found.push_back(&row_kernels_avx2());
#elif defined(__aarch64__)
    found.push_back(&row_kernels_neon());
#endif
    found.push_back(&row_kernels_portable());
    return found;
}

bool operator==(const InputFormat &a, const InputFormat &b) {
    return a.kind == b.kind && a.group == b.group && a.range == b.range && a.static_scale == b.static_scale;
}

void AlignedBuffer::Free::operator()(void *memory) const { std::free(memory); }

void AlignedBuffer::reserve(std::size_t bytes) {
    if (bytes <= bytes_) return;
    const std::size_t rounded = (bytes + kLine - 1) / kLine * kLine + kLine; // a line behind the end for loads that read on
    memory_.reset();
    bytes_ = 0;
    memory_.reset(std::aligned_alloc(kLine, rounded));
    if (!memory_) throw std::bad_alloc();
    bytes_ = bytes;
}

void PreparedInput::reshape(const InputFormat &format, std::size_t rows, std::size_t columns, std::size_t threads) {
    input_ = Input();
    input_.format = format;
    input_.rows = rows;
    input_.columns = columns;
    scratch_.reserve(threads * columns * sizeof(float));
    if (format.kind == InputKind::float32) {
        values_.reserve(rows * columns * sizeof(float));
        return;
    }
    if (format.group == 0 || format.group % 8 != 0) throw std::invalid_argument("a group of inputs is not a multiple of 8");
    input_.groups = (columns + format.group - 1) / format.group;
    if (format.kind == InputKind::int24_groups && format.group % 16 != 0) throw std::invalid_argument("a group of inputs is not a multiple of 16");
    const std::size_t digits = digits_of(format);
    input_.code_stride = (input_.groups * format.group + kLine - 1) / kLine * kLine;
    if (input_.code_stride / kLine % 2 == 0) input_.code_stride += kLine;
    codes_.reserve(rows * digits * input_.code_stride);
    scales_.reserve(rows * input_.groups * sizeof(float));
    sums_.reserve(rows * digits * input_.groups * sizeof(std::int32_t));
    starts_.reserve(rows * input_.groups * sizeof(std::int32_t));
    input_.codes = static_cast<const std::int8_t *>(codes_.data());
    input_.scales = static_cast<const float *>(scales_.data());
    input_.sums = static_cast<const std::int32_t *>(sums_.data());
    input_.starts = static_cast<const std::int32_t *>(starts_.data());
}

void PreparedInput::fill(const Rows &x, const Norm &norm, std::size_t thread, std::size_t threads) {
    const bool copies = norm.weight != nullptr || x.type != Type::float32;
    if (input_.format.kind == InputKind::float32 && !copies) {
        if (thread == 0) refer(x);
        return;
    }
    if (thread == 0 && input_.format.kind == InputKind::float32) {
        input_.values = static_cast<const float *>(values_.data());
        input_.stride = input_.columns;
    }
    // Many rows: whole rows for each thread. Few: each row's columns are shared out, and the norm's sum is computed by everybody.
    const bool by_rows = input_.rows >= threads;
    const std::size_t first = by_rows ? input_.rows * thread / threads : 0;
    const std::size_t last = by_rows ? input_.rows * (thread + 1) / threads : input_.rows;
    const Part part = by_rows ? Part{0, 1} : Part{thread, threads};
    float *scratch = static_cast<float *>(scratch_.data()) + thread * input_.columns;
    for (std::size_t row = first; row < last; ++row) fill_row(x, norm, row, part, scratch);
}

void PreparedInput::fill_row(const Rows &x, const Norm &norm, std::size_t row, const Part &part, float *scratch) {
    const RowKernels &kernels = row_kernels();
    const float *values = row_values(x, row, scratch);
    float factor = 1.0f;
    if (norm.weight != nullptr) factor = 1.0f / std::sqrt(kernels.sum_of_squares(values, x.columns) / float(x.columns) + norm.epsilon);
    const bool quantizes = input_.format.kind != InputKind::float32;
    const std::size_t unit = quantizes ? input_.format.group : 64;
    const std::size_t units = (x.columns + unit - 1) / unit;
    for (std::size_t i = units * part.index / part.count; i < units * (part.index + 1) / part.count; ++i) {
        const std::size_t at = i * unit, count = std::min(unit, x.columns - at);
        const float *from = values + at;
        float *to = quantizes ? scratch + at : static_cast<float *>(values_.data()) + row * x.columns + at;
        if (norm.weight != nullptr) {
            kernels.normalize(from, norm.weight + at, factor, norm.round, to, count);
            from = to;
        } else if (!quantizes) {
            std::copy_n(from, count, to);
        }
        if (quantizes) quantize(row, i, from, count);
    }
}

void PreparedInput::put(std::size_t row, std::size_t first, const float *values, std::size_t count) {
    const std::size_t group = input_.format.group;
    for (std::size_t at = 0; at < count; at += group) quantize(row, (first + at) / group, values + at, std::min(group, count - at));
}

void PreparedInput::quantize(std::size_t row, std::size_t group, const float *values, std::size_t count) {
    const InputFormat &format = input_.format;
    const std::size_t at = row * input_.groups + group;
    if (format.kind == InputKind::int24_groups) {
        split_digits()(values, count, format.group,
                       static_cast<std::int8_t *>(codes_.data()) + 3 * row * input_.code_stride + group * format.group, input_.code_stride,
                       static_cast<float *>(scales_.data()) + at, static_cast<std::int32_t *>(sums_.data()) + 3 * row * input_.groups + group,
                       input_.groups);
        return;
    }
    std::int8_t *codes = static_cast<std::int8_t *>(codes_.data()) + row * input_.code_stride + group * format.group;
    float *scale = static_cast<float *>(scales_.data()) + at;
    const std::int32_t sum = row_kernels().quantize(values, count, format.group, format.range, format.static_scale, codes, scale);
    static_cast<std::int32_t *>(sums_.data())[at] = sum;
    static_cast<std::int32_t *>(starts_.data())[at] = -8 * sum;
}

void PreparedInput::refer(const Rows &x) {
    input_.values = static_cast<const float *>(x.data);
    input_.stride = x.stride;
}

Input PreparedInput::rows(std::size_t begin, std::size_t count) const {
    Input part = input_;
    part.rows = count;
    if (part.values != nullptr) part.values += begin * part.stride;
    if (part.codes != nullptr) {
        const std::size_t digits = digits_of(part.format);
        part.codes += begin * digits * part.code_stride;
        part.scales += begin * part.groups;
        part.sums += begin * digits * part.groups;
        part.starts += begin * part.groups;
    }
    return part;
}

} // namespace fewbit
