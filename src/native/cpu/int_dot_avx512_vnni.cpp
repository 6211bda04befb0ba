// int_dot.hpp for AVX-512 with VNNI: vpdpbusd adds four products of unsigned and signed bytes to each of sixteen 32-bit sums.
//
// One token (`multiply_one`) reads weights from memory once, and the loop must not be slower than memory. INT4 costs two masks and two dot
// products a line: the upper nibbles are not shifted down, their sums come out sixteen times too large and are shifted once per group.
//
// Several tokens (`multiply_some`): 32 rows of the weight times up to 12 tokens in 24 registers of sums, so that a broadcast of x serves two
// products and a load of the weight up to twelve.
//
// Many tokens: INT4 is spread to bytes first, 32 rows of up to kBlock columns at a time, and these stay in the L2 cache for all tokens.
//
// This file is compiled for AVX-512 and may only run where it is there: no inline function of another header, nothing of the standard library.

#include "int_dot.hpp"

#include <immintrin.h>

namespace fewbit {
namespace {

constexpr std::size_t kTokens = 12;       // of a register block
constexpr std::size_t kBlock = 2048;      // columns that are spread at once
constexpr std::size_t kPrefetch = 2048;   // bytes ahead
constexpr std::size_t kTileLoad = kTileRows * sizeof(float);

inline __m512i broadcast4(const void *from) {
    int value;
    __builtin_memcpy(&value, from, sizeof value);
    return _mm512_set1_epi32(value);
}

inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// The scales of a tile for one group.
inline __m512 group_scale(const IntWeight &w, std::size_t tile, std::size_t group) {
    if (w.scale_layout == ScaleLayout::groups_float32) {
        return _mm512_load_ps(static_cast<const float *>(w.scales) + (tile * w.groups + group) * kTileRows);
    }
    const std::size_t pairs = (w.groups + 1) / 2;
    const __m512i pair = _mm512_load_si512(static_cast<const char *>(w.scales) + (tile * pairs + group / 2) * kTileLoad);
    const __m512i bits = group % 2 == 0 ? _mm512_slli_epi32(pair, 16) : _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000)));
    return _mm512_castsi512_ps(bits);
}

inline __m512i zero_points(const IntWeight &w, std::size_t line) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w.zeros + line * kTileRows)));
}

// z * sum of x: both fit 16 bits, as a group has at most 128 columns where zero points belong to groups. The upper halves are signs: z's is
// cleared, or it would add a product of its own.
inline __m512i zero_correction(const IntWeight &w, std::size_t line, const std::int32_t *sum) {
    return _mm512_madd_epi16(_mm512_and_si512(zero_points(w, line), _mm512_set1_epi32(0xffff)), broadcast4(sum));
}

// Per channel: y * scale, with the zero points' part taken off; `total` is sum_g s_x * sum of x.
inline __m512 channel_result(const IntWeight &w, std::size_t tile, __m512 y, float total) {
    if (w.zeros != nullptr) y = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(zero_points(w, tile)), _mm512_set1_ps(total), y);
    return _mm512_mul_ps(y, _mm512_load_ps(static_cast<const float *>(w.scales) + tile * kTileRows));
}

float scaled_total(const Input &x, std::size_t token) {
    float total = 0;
    for (std::size_t g = 0; g < x.groups; ++g) total += x.scales[token * x.groups + g] * float(x.sums[token * x.groups + g]);
    return total;
}

inline __mmask16 row_mask(std::size_t rows) { return rows >= kTileRows ? 0xffff : __mmask16((1u << rows) - 1); }

// ---------------------------------------------------------------------------------------------------------------- one token

// Sum of one group of a tile, offsets taken off.
template <int Bits> inline __m512i dot_one(const std::uint8_t *codes, const std::int8_t *x, std::size_t columns, const std::int32_t *start) {
    if constexpr (Bits == 4) {
        const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8(char(0xf0));
        __m512i a = broadcast4(start), b = _mm512_setzero_si512(), c = b, d = b;
        for (std::size_t k = 0; k < columns; k += 16, codes += 2 * kLineBytes) {
            const __m512i first = _mm512_load_si512(codes), second = _mm512_load_si512(codes + kLineBytes);
            _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetch), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetch + kLineBytes), _MM_HINT_T0);
            a = _mm512_dpbusd_epi32(a, _mm512_and_si512(first, low), broadcast4(x + k));
            b = _mm512_dpbusd_epi32(b, _mm512_and_si512(first, high), broadcast4(x + k + 4));
            c = _mm512_dpbusd_epi32(c, _mm512_and_si512(second, low), broadcast4(x + k + 8));
            d = _mm512_dpbusd_epi32(d, _mm512_and_si512(second, high), broadcast4(x + k + 12));
        }
        return _mm512_add_epi32(_mm512_add_epi32(a, c), _mm512_srai_epi32(_mm512_add_epi32(b, d), 4));
    } else {
        __m512i a = _mm512_slli_epi32(broadcast4(start), 4), b = _mm512_setzero_si512();
        for (std::size_t k = 0; k < columns; k += 8, codes += 2 * kLineBytes) {
            _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetch), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetch + kLineBytes), _MM_HINT_T0);
            a = _mm512_dpbusd_epi32(a, _mm512_load_si512(codes), broadcast4(x + k));
            b = _mm512_dpbusd_epi32(b, _mm512_load_si512(codes + kLineBytes), broadcast4(x + k + 4));
        }
        return _mm512_add_epi32(a, b);
    }
}

template <int Bits> void multiply_one(const IntWeight &w, const Input &x, float *y, std::size_t begin, std::size_t end) {
    const std::size_t group_bytes = w.group * kTileRows * Bits / 8;
    const bool channel = w.scale_layout == ScaleLayout::channel;
    const float total = channel && w.zeros != nullptr ? scaled_total(x, 0) : 0.0f;
    for (std::size_t first = begin; first < end; first += kTileRows) {
        const std::size_t tile = first / kTileRows;
        const std::uint8_t *codes = w.codes + tile * w.groups * group_bytes;
        __m512 result = _mm512_setzero_ps();
        for (std::size_t g = 0; g < w.groups; ++g, codes += group_bytes) {
            __m512i sum = dot_one<Bits>(codes, x.codes + g * w.group, w.group, x.starts + g);
            __m512 scale = _mm512_set1_ps(x.scales[g]);
            if (!channel) {
                if (w.zeros != nullptr) sum = _mm512_sub_epi32(sum, zero_correction(w, tile * w.groups + g, x.sums + g));
                scale = _mm512_mul_ps(scale, group_scale(w, tile, g));
            }
            result = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, result);
        }
        if (channel) result = channel_result(w, tile, result, total);
        _mm512_mask_storeu_ps(y + first, row_mask(end - first), result);
    }
}

// ------------------------------------------------------------------------------------------------------------ several tokens

// A register block: `Tiles` tiles, `Tokens` tokens, all groups of [first_group, last_group).
struct Block {
    const std::uint8_t *codes; // of the first group
    std::size_t tile_bytes;    // from one tile to the next
    std::size_t tile;
    std::size_t token;
    std::size_t first_group, last_group;
    int start_shift;           // the sums start at starts << it
    float *y;                  // of the first token and row
    std::size_t y_stride;
    std::size_t rows;
};

template <int Tiles, int Tokens>
inline void add_group(const IntWeight &w, const Input &x, const Block &block, std::size_t g, const __m512i (&sums)[Tiles][Tokens]) {
    const bool channel = w.scale_layout == ScaleLayout::channel, fresh = g == 0;
#pragma GCC unroll 2
    for (int t = 0; t < Tiles; ++t) {
        const __mmask16 mask = row_mask(block.rows - std::size_t(t) * kTileRows);
        const __m512 scale = channel ? _mm512_set1_ps(1.0f) : group_scale(w, block.tile + t, g);
#pragma GCC unroll 12
        for (int m = 0; m < Tokens; ++m) {
            const std::size_t at = (block.token + m) * x.groups + g;
            __m512i sum = sums[t][m];
            if (!channel && w.zeros != nullptr) {
                sum = _mm512_sub_epi32(sum, zero_correction(w, (block.tile + t) * w.groups + g, x.sums + at));
            }
            float *to = block.y + m * block.y_stride + t * kTileRows;
            const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, to);
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at]));
            _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, before));
        }
    }
}

template <int Bits, int Tiles, int Tokens> void multiply_block(const IntWeight &w, const Input &x, const Block &block) {
    const std::size_t x_stride = x.groups * w.group;
    const std::uint8_t *codes = block.codes;
    for (std::size_t g = block.first_group; g < block.last_group; ++g) {
        __m512i sums[Tiles][Tokens];
#pragma GCC unroll 12
        for (int m = 0; m < Tokens; ++m) {
            const __m512i start = broadcast4(x.starts + (block.token + m) * x.groups + g);
            sums[0][m] = _mm512_sll_epi32(start, _mm_cvtsi32_si128(block.start_shift));
            if constexpr (Tiles == 2) sums[1][m] = sums[0][m];
        }
        const std::int8_t *values = x.codes + block.token * x_stride + g * w.group;
        for (std::size_t k = 0; k < w.group; k += Bits == 4 ? 8 : 4, codes += kLineBytes) {
            __m512i line[2];
#pragma GCC unroll 2
            for (int t = 0; t < Tiles; ++t) line[t] = _mm512_load_si512(codes + t * block.tile_bytes);
            if constexpr (Bits == 4) {
                const __m512i mask = _mm512_set1_epi8(0x0f);
                __m512i low[2];
#pragma GCC unroll 2
                for (int t = 0; t < Tiles; ++t) {
                    low[t] = _mm512_and_si512(line[t], mask);
                    line[t] = _mm512_and_si512(_mm512_srli_epi32(line[t], 4), mask);
                }
#pragma GCC unroll 12
                for (int m = 0; m < Tokens; ++m) {
                    const __m512i some = broadcast4(values + m * x_stride + k);
                    sums[0][m] = _mm512_dpbusd_epi32(sums[0][m], low[0], some);
                    if constexpr (Tiles == 2) sums[1][m] = _mm512_dpbusd_epi32(sums[1][m], low[1], some);
                }
            }
#pragma GCC unroll 12
            for (int m = 0; m < Tokens; ++m) {
                const __m512i some = broadcast4(values + m * x_stride + k + (Bits == 4 ? 4 : 0));
                sums[0][m] = _mm512_dpbusd_epi32(sums[0][m], line[0], some);
                if constexpr (Tiles == 2) sums[1][m] = _mm512_dpbusd_epi32(sums[1][m], line[1], some);
            }
        }
        add_group<Tiles, Tokens>(w, x, block, g, sums);
    }
}

using BlockFunction = void (*)(const IntWeight &, const Input &, const Block &);

template <int Bits, int Tiles>
constexpr BlockFunction kBlocks[kTokens] = {
    multiply_block<Bits, Tiles, 1>, multiply_block<Bits, Tiles, 2>,  multiply_block<Bits, Tiles, 3>,  multiply_block<Bits, Tiles, 4>,
    multiply_block<Bits, Tiles, 5>, multiply_block<Bits, Tiles, 6>,  multiply_block<Bits, Tiles, 7>,  multiply_block<Bits, Tiles, 8>,
    multiply_block<Bits, Tiles, 9>, multiply_block<Bits, Tiles, 10>, multiply_block<Bits, Tiles, 11>, multiply_block<Bits, Tiles, 12>};

// All tokens in register blocks of about equal size.
template <int Bits> void all_tokens(const IntWeight &w, const Input &x, Block block) {
    const std::size_t blocks = (x.rows + kTokens - 1) / kTokens;
    float *const y = block.y;
    for (std::size_t i = 0; i < blocks; ++i) {
        block.token = x.rows * i / blocks;
        block.y = y + block.token * block.y_stride;
        const std::size_t tokens = x.rows * (i + 1) / blocks - block.token;
        const BlockFunction run = block.rows > kTileRows ? kBlocks<Bits, 2>[tokens - 1] : kBlocks<Bits, 1>[tokens - 1];
        run(w, x, block);
    }
}

// INT4 lines to INT8 lines.
void spread(const std::uint8_t *codes, std::size_t lines, std::uint8_t *out) {
    const __m512i mask = _mm512_set1_epi8(0x0f);
    for (std::size_t i = 0; i < lines; ++i, codes += kLineBytes, out += 2 * kLineBytes) {
        const __m512i line = _mm512_load_si512(codes);
        _mm512_store_si512(out, _mm512_and_si512(line, mask));
        _mm512_store_si512(out + kLineBytes, _mm512_and_si512(_mm512_srli_epi32(line, 4), mask));
    }
}

void finish_channels(const IntWeight &w, const Input &x, const Block &block) {
    for (std::size_t m = 0; m < x.rows; ++m) {
        const float total = w.zeros != nullptr ? scaled_total(x, m) : 0.0f;
        for (std::size_t row = 0; row < block.rows; row += kTileRows) {
            float *to = block.y + m * block.y_stride + row;
            const __mmask16 mask = row_mask(block.rows - row);
            const __m512 result = channel_result(w, block.tile + row / kTileRows, _mm512_maskz_loadu_ps(mask, to), total);
            _mm512_mask_storeu_ps(to, mask, result);
        }
    }
}

template <int Bits>
void multiply_some(const IntWeight &w, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) {
    const std::size_t group_bytes = w.group * kTileRows * Bits / 8, tile_bytes = w.groups * group_bytes;
    const bool spreads = Bits == 4 && x.rows > kTokens && w.group <= kBlock;
    const std::size_t step = spreads ? kBlock / w.group : w.groups;
    alignas(kLineBytes) std::uint8_t scratch[Bits == 4 ? 2 * kTileRows * kBlock : 1];
    for (std::size_t first = begin; first < end; first += 2 * kTileRows) {
        Block block{};
        block.tile = first / kTileRows;
        block.rows = least(2 * kTileRows, end - first);
        block.y = y + first;
        block.y_stride = y_stride;
        block.tile_bytes = tile_bytes;
        block.start_shift = Bits == 4 ? 0 : 4;
        for (std::size_t g = 0; g < w.groups; g += step) {
            block.first_group = g;
            block.last_group = least(g + step, w.groups);
            block.codes = w.codes + block.tile * tile_bytes + g * group_bytes;
            if (spreads) {
                const std::size_t bytes = (block.last_group - g) * group_bytes;
                for (std::size_t t = 0; t * kTileRows < block.rows; ++t) {
                    spread(block.codes + t * tile_bytes, bytes / kLineBytes, scratch + t * 2 * bytes);
                }
                block.codes = scratch;
                block.tile_bytes = 2 * bytes;
                all_tokens<8>(w, x, block);
            } else {
                all_tokens<Bits>(w, x, block);
            }
        }
        if (w.scale_layout == ScaleLayout::channel) finish_channels(w, x, block);
    }
}

template <int Bits>
void multiply(const IntWeight &w, const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) {
    if (x.rows == 1) {
        multiply_one<Bits>(w, x, y, begin, end);
    } else {
        multiply_some<Bits>(w, x, y, y_stride, begin, end);
    }
}

constexpr IntKernels kKernels{"avx512-vnni", multiply<4>, multiply<8>};

} // namespace

const IntKernels &int_kernels_avx512_vnni() { return kKernels; }

} // namespace fewbit
