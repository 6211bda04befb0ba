// What the engine computes besides the linears, as plain data and a table of functions per instruction set.
//
// The functions are written once (simd.inc, elementwise.inc, kv_head.inc, attention.inc), with the vectors that GCC and Clang know as
// types, and compiled once per instruction set (kernels_*.cpp); `kernels()` gives the widest table that this CPU runs.
//
// Numbers. Activations are float32 in memory. A model in BF16 rounds them (`bf16`) wherever its transformers implementation does: after
// every linear, norm, product and sum. So both give the same tokens, but for ties that the order of a sum breaks, and a quality that was
// measured through one holds for the other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit::engine {

constexpr std::size_t kBlock = 16;       // tokens whose keys lie side by side
constexpr std::size_t kKeys = 64;        // tokens that attention looks at in one go
constexpr std::size_t kQueries = 64;     // rows (positions times heads that share keys) that it does so for
constexpr std::size_t kInt4Group = 32;   // neighbours that share a scale in the INT4 cache

enum class KvKind : int { none, float32, bfloat16, int8, fp8, int4 };

// Keys and values of one head of one sequence in one layer: a history in a quantized format (or none), and a window of the newest tokens in
// the model's own dtype. Token p lies at p in the history and at p % ring in the window. Keys lie in blocks of 16 tokens, so that a vector
// holds one channel of 16 tokens and scores need no sum across lanes:
//
//     keys      [tokens / 16][dim][16]      INT4: [tokens / 16][dim / 2][16] bytes, the even channel in the low four bits
//     values    [tokens][dim]               INT4: [tokens][dim / 32][16] bytes, channel j of the group in the low bits and j + 16 in the high
//     scales    BF16, one per token (INT8, FP8) or per 32 channels of a token (INT4); keys: [tokens / 16][groups][16], values: [tokens][groups]
//     zeros     INT4's zero points, like the scales
struct KvHead {
    KvKind history, window;
    std::size_t dim, groups, ring;
    void *keys, *values;
    std::uint16_t *key_scales, *value_scales;
    std::int8_t *key_zeros, *value_zeros;
    void *window_keys, *window_values;
};

// Queries of one or more neighbouring positions, for the heads that share the keys of one KvHead.
struct Attention {
    const KvHead *head;
    std::size_t history;            // tokens before this one are read from the history, the others from the window
    const float *queries;           // of the first position and head; heads lie `dim` apart, positions `stride`
    float *out;                     // the same, positions `out_stride` apart
    std::size_t stride, out_stride, heads;
    std::size_t first, count;       // positions; heads * count <= kQueries
    std::size_t begin, end;         // keys to look at, of those that the mask leaves
    std::size_t sliding;            // a position sees itself and at most sliding - 1 before it; 0: all before it
    float scale;
    bool bf16;
    float *maxima, *sums;           // [count, heads]: not null where the keys are only a part; then `out` is not divided by the sums
    float *scratch;                 // attention_scratch(dim) floats, aligned to 64 bytes
};

constexpr std::size_t padded(std::size_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
constexpr std::size_t attention_scratch(std::size_t dim) {
    return kQueries * padded(dim) * 2 + kKeys * padded(dim) * 2 + kQueries * kKeys + 2 * kQueries;
}

struct Kernels {
    const char *name;
    void (*embed_bf16)(const std::uint16_t *row, std::size_t n, float *out);
    // y = x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).
    void (*rms_norm)(const float *x, const float *weight, std::size_t n, float eps, bool bf16, float *y);
    // Rotates the two halves of one head against each other (arXiv 2104.09864); cosine and sine: [dim / 2].
    void (*rotate)(float *x, const float *cosine, const float *sine, std::size_t dim, bool bf16);
    // y = y + bias, rounded; bias may be null.
    void (*finish)(float *y, const float *bias, std::size_t n, bool bf16);
    // x = x + y
    void (*add)(float *x, const float *y, std::size_t n, bool bf16);
    // out = silu(gate) * up
    void (*silu_multiply)(const float *gate, const float *up, std::size_t n, bool bf16, float *out);
    // The first of the largest values, NaN counting as the largest of all.
    std::size_t (*argmax)(const float *x, std::size_t n);
    // Writes a token into the window, into the history, or from the window into the history.
    void (*put_window)(const KvHead &head, std::size_t position, const float *key, const float *value);
    void (*put_history)(const KvHead &head, std::size_t position, const float *key, const float *value);
    void (*retire)(const KvHead &head, std::size_t position);
    void (*attend)(const Attention &attention);
};

const Kernels &kernels();

namespace portable { extern const Kernels kKernels; }
#if defined(FEWBIT_X86)
namespace avx2 { extern const Kernels kKernels; }
namespace avx512 { extern const Kernels kKernels; }
#endif

}  // namespace fewbit::engine
