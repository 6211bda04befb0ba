// int_dot.hpp for AVX-512 with VNNI: vpdpbusd adds four products of unsigned and signed bytes to each of sixteen 32-bit sums.
//
// One token (`multiply_one`) reads weights from memory once, and the loop must not be slower than memory. INT4 costs two masks and two dot
// products a line: the upper nibbles are not shifted down, their sums come out sixteen times too large and are shifted once per group. Four tiles
// are read side by side, two or three lines of each in turn: the prefetchers of the second-level cache keep up with several streams that advance
// together better than with one after the other, and a broadcast of x serves all four.
//
// Several tokens (`multiply_some`): 32 rows of the weight times up to 12 tokens in 24 registers of sums, so that a broadcast of x serves two
// products and a load of the weight up to twelve.
//
// Many tokens: 32 rows of kBlock columns at a time, spread to bytes first (INT2 and INT3 from two tokens on), stay in the second level cache
// for all tokens. Twelve tokens use a line of the weight for twelve cycles, so that it need not come from the first; shorter blocks, which would
// stay there, lose more by adding to y more often.
//
// This file is compiled for AVX-512 and may only run where it is there: no inline function of another header, nothing of the standard library.

#include "int_dot.hpp"

#include <immintrin.h>

namespace fewbit {
namespace {

constexpr std::size_t kTokens = 12;       // of a register block
constexpr std::size_t kBlock = 2048;      // columns at once: longer is faster while 32 rows of it, as bytes, leave the second level cache room
constexpr std::size_t kDirectTokens = 48; // up to here INT4 is not spread
constexpr std::size_t kPrefetch = 1024;   // bytes ahead in each stream
constexpr int kStreams = 4;               // tiles side by side at one token

inline __m512i broadcast4(const void *from) {
    int value;
    __builtin_memcpy(&value, from, sizeof value);
    return _mm512_set1_epi32(value);
}

inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

inline const char *scales_of(const IntWeight &w, std::size_t tile) { return static_cast<const char *>(w.scales) + tile * w.scale_stride; }

// The scales of a tile for one group.
inline __m512 group_scale(const IntWeight &w, std::size_t tile, std::size_t group) {
    if (w.scale_layout == ScaleLayout::groups_float32) return _mm512_load_ps(scales_of(w, tile) + group * kLineBytes);
    const __m512i pair = _mm512_load_si512(scales_of(w, tile) + group / 2 * kLineBytes);
    const __m512i bits = group % 2 == 0 ? _mm512_slli_epi32(pair, 16) : _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000)));
    return _mm512_castsi512_ps(bits);
}

inline __m512i zero_points(const IntWeight &w, std::size_t tile, std::size_t group) {
    const std::int8_t *zeros = w.zeros + tile * w.zero_stride + group * kTileRows;
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(zeros)));
}

// z * sum of x: both fit 16 bits, as a group has at most 128 columns where zero points belong to groups. The upper halves are signs: z's is
// cleared, or it would add a product of its own.
inline __m512i zero_correction(const IntWeight &w, std::size_t tile, std::size_t group, const std::int32_t *sum) {
    return _mm512_madd_epi16(_mm512_and_si512(zero_points(w, tile, group), _mm512_set1_epi32(0xffff)), broadcast4(sum));
}

// Per channel: y * scale, with the zero points' part taken off; `total` is sum_g s_x * sum of x.
inline __m512 channel_result(const IntWeight &w, std::size_t tile, __m512 y, float total) {
    if (w.zeros != nullptr) y = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(zero_points(w, tile, 0)), _mm512_set1_ps(total), y);
    return _mm512_mul_ps(y, _mm512_load_ps(scales_of(w, tile)));
}

float scaled_total(const Input &x, std::size_t token) {
    float total = 0;
    for (std::size_t g = 0; g < x.groups; ++g) total += x.scales[token * x.groups + g] * float(x.sums[token * x.groups + g]);
    return total;
}

inline __mmask16 row_mask(std::size_t rows) { return rows >= kTileRows ? 0xffff : __mmask16((1u << rows) - 1); }

// ---------------------------------------------------------------------------------------------------------------- one token

// Always inlined: GCC takes a function that only prefetches for one without effects and drops calls to it.
inline __attribute__((always_inline)) void prefetch(const void *at) { _mm_prefetch(static_cast<const char *>(at), _MM_HINT_T0); }

inline __m512i line_at(const std::uint8_t *codes, std::size_t line) { return _mm512_load_si512(codes + line * kLineBytes); }

inline __m512i field(__m512i line, int mask) { return _mm512_and_si512(line, _mm512_set1_epi8(char(mask))); }

// The top three bits of each byte: two of `high`, below them bit 5 of `low`.
inline __m512i join(__m512i high, __m512i low) {
    const __m512i top = _mm512_set1_epi8(char(0xc0));
    return field(_mm512_ternarylogic_epi32(top, high, low, 0xca), 0xe0);
}

// dpbusd in place. The intrinsic makes GCC 12 copy every sum before and after, and a block of 24 sums no longer fits the registers.
inline void dot_in_place(__m512i &sum, __m512i codes, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x)); }

// Indices as types: the compiler keeps an array in registers when all of its indices are constants before it optimizes anything.
template <int Value> struct Index {
    static constexpr int value = Value;
};

template <int Count, int From = 0, typename Body> inline __attribute__((always_inline)) void each(const Body &body) {
    if constexpr (From < Count) {
        body(Index<From>{});
        each<Count, From + 1>(body);
    }
}

#define FEWBIT_INLINE __attribute__((always_inline))

// A line and a mask. In assembler, because GCC 12 loads the lines of four tiles first, once for all masks, and then has no registers for them.
inline __m512i field_at(const std::uint8_t *line, __m512i mask) {
    __m512i result;
    asm("vpandd %1, %2, %0" : "=v"(result) : "m"(*reinterpret_cast<const __m512i *>(line)), "v"(mask));
    return result;
}

// How one token reads a format: a step is kLines lines that hold kQuads times four columns. Fields stay where they are in their bytes; those at
// the same place add to the same sum, and `total` shifts each sum once.
template <int Bits> struct Step {
    static constexpr int kLines = Bits == 3 ? 3 : 2, kQuads = kLines * 64 / (8 * Bits), kFields = 8 / Bits, kSums = Bits == 8 ? 2 : kFields;

    template <int Quad> static constexpr int sum_of() { return Quad % kSums; }
    template <int Quad> static __m512i codes(const std::uint8_t *step) {
        if constexpr (Bits == 8) return line_at(step, Quad);
        else return field_at(step + Quad / kFields * kLineBytes, _mm512_set1_epi8(char(((1 << Bits) - 1) << (Quad % kFields * Bits))));
    }
    // Sums of a group; `start`, -8 times the sum of x, takes the offsets off.
    static __m512i total(__m512i start, const __m512i (&sums)[kSums]) {
        if constexpr (Bits == 8) {
            return _mm512_add_epi32(_mm512_slli_epi32(start, 4), _mm512_add_epi32(sums[0], sums[1]));
        } else {
            __m512i all = _mm512_add_epi32(_mm512_srai_epi32(start, 4 - Bits), sums[0]);
            each<kSums, 1>([&](auto i) FEWBIT_INLINE { all = _mm512_add_epi32(all, _mm512_srai_epi32(sums[i.value], i.value * Bits)); });
            return all;
        }
    }
};

template <> struct Step<3> {
    static constexpr int kLines = 3, kQuads = 8, kSums = 3;

    template <int Quad> static constexpr int sum_of() { return Quad < 6 ? Quad % 2 : 2; }
    template <int Quad> static __m512i codes(const std::uint8_t *step) {
        if constexpr (Quad < 6) return field_at(step + Quad / 2 * kLineBytes, _mm512_set1_epi8(Quad % 2 == 0 ? 0x07 : 0x38));
        else return join(line_at(step, Quad - 6), _mm512_srli_epi32(line_at(step, 2), Quad - 5));
    }
    static __m512i total(__m512i start, const __m512i (&sums)[kSums]) {
        const __m512i low = _mm512_add_epi32(_mm512_srai_epi32(start, 1), sums[0]);
        return _mm512_add_epi32(low, _mm512_add_epi32(_mm512_srai_epi32(sums[1], 3), _mm512_srai_epi32(sums[2], 5)));
    }
};

// `Tiles` tiles from `tile` on, a step of each in turn.
template <int Bits, int Tiles>
void multiply_tiles(const IntWeight &w, const Input &x, float *y, std::size_t tile, std::size_t rows, float total) {
    using Format = Step<Bits>;
    const bool channel = w.scale_layout == ScaleLayout::channel;
    const std::size_t stride = w.code_stride, groups_per_line = w.scale_layout == ScaleLayout::groups_bfloat16 ? 2 : 1;
    const std::uint8_t *codes = w.codes + tile * stride;
    __m512 results[Tiles];
    each<Tiles>([&](auto t) FEWBIT_INLINE { results[t.value] = _mm512_setzero_ps(); });
    for (std::size_t g = 0; g < w.groups; ++g) {
        __m512i sums[Tiles][Format::kSums];
        each<Tiles>([&](auto t) FEWBIT_INLINE {
            each<Format::kSums>([&](auto i) FEWBIT_INLINE { sums[t.value][i.value] = _mm512_setzero_si512(); });
            if (!channel) prefetch(scales_of(w, tile + t.value) + (g / groups_per_line + 1) * kLineBytes);
        });
        const std::int8_t *values = x.codes + g * w.group;
        const std::int8_t *const end = values + w.group;
        for (; values != end; values += 4 * Format::kQuads, codes += Format::kLines * kLineBytes) {
            each<Tiles>([&](auto t) FEWBIT_INLINE {
                each<Format::kLines>([&](auto i) FEWBIT_INLINE { prefetch(codes + t.value * stride + kPrefetch + i.value * kLineBytes); });
            });
            each<Format::kQuads>([&](auto q) FEWBIT_INLINE {
                const __m512i some = broadcast4(values + 4 * q.value);
                each<Tiles>([&](auto t) FEWBIT_INLINE {
                    __m512i &sum = sums[t.value][Format::template sum_of<decltype(q)::value>()];
                    dot_in_place(sum, Format::template codes<decltype(q)::value>(codes + t.value * stride), some);
                });
            });
        }
        const __m512 x_scale = _mm512_set1_ps(x.scales[g]);
        const __m512i start = broadcast4(x.starts + g);
        each<Tiles>([&](auto t) FEWBIT_INLINE {
            __m512i sum = Format::total(start, sums[t.value]);
            __m512 scale = x_scale;
            if (!channel) {
                if (w.zeros != nullptr) sum = _mm512_sub_epi32(sum, zero_correction(w, tile + t.value, g, x.sums + g));
                scale = _mm512_mul_ps(scale, group_scale(w, tile + t.value, g));
            }
            results[t.value] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, results[t.value]);
        });
    }
    each<Tiles>([&](auto t) FEWBIT_INLINE {
        const __m512 result = channel ? channel_result(w, tile + t.value, results[t.value], total) : results[t.value];
        _mm512_mask_storeu_ps(y + t.value * kTileRows, row_mask(rows - std::size_t(t.value) * kTileRows), result);
    });
}

template <int Bits> void multiply_one(const IntWeight &w, const Input &x, float *y, std::size_t begin, std::size_t end) {
    const bool channel = w.scale_layout == ScaleLayout::channel;
    const float total = channel && w.zeros != nullptr ? scaled_total(x, 0) : 0.0f;
    std::size_t first = begin;
    for (; first + (kStreams - 1) * kTileRows < end; first += kStreams * kTileRows) {
        multiply_tiles<Bits, kStreams>(w, x, y + first, first / kTileRows, end - first, total);
    }
    for (; first < end; first += kTileRows) multiply_tiles<Bits, 1>(w, x, y + first, first / kTileRows, end - first, total);
}

// ------------------------------------------------------------------------------------------------------------ several tokens

// A register block: `Tiles` tiles, `Tokens` tokens, all groups of [first_group, last_group).
struct Block {
    const std::uint8_t *codes; // of the first group
    std::size_t tile_bytes;    // from one tile to the next
    std::size_t tile;
    std::size_t token;
    std::size_t first_group, last_group;
    bool sixteenfold;          // the sums start at 16 times x.starts
    float *y;                  // of the first token and row
    std::size_t y_stride;
    std::size_t rows;
};

// The totals to y: in its place, or on top of what the groups before have left there.
template <int Tiles, int Tokens> inline void put(const Block &block, const float (&totals)[Tokens][Tiles * kTileRows]) {
    for (int m = 0; m < Tokens; ++m) {
        for (int t = 0; t < Tiles; ++t) {
            const __mmask16 mask = row_mask(block.rows - std::size_t(t) * kTileRows);
            float *to = block.y + m * block.y_stride + t * kTileRows;
            __m512 total = _mm512_load_ps(totals[m] + t * kTileRows);
            if (block.first_group != 0) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, to));
            _mm512_mask_storeu_ps(to, mask, total);
        }
    }
}

// Rows that lie `stride` bytes apart: every third has a register, the others are one addressing mode away. A register for each of twelve does not
// fit beside the rest.
template <int Rows> struct RowPointers {
    static constexpr int kBases = (Rows + 2) / 3;
    const char *bases[kBases];
    std::size_t stride;

    FEWBIT_INLINE RowPointers(const void *first, std::size_t apart) : stride(apart) {
        each<kBases>([&](auto i) FEWBIT_INLINE { bases[i.value] = static_cast<const char *>(first) + 3 * i.value * apart; });
    }
    template <int Row> FEWBIT_INLINE const char *at(Index<Row>) const { return bases[Row / 3] + (Row % 3) * stride; }
    FEWBIT_INLINE void advance(std::size_t bytes) {
        each<kBases>([&](auto i) FEWBIT_INLINE {
            bases[i.value] += bytes;
            asm("" : "+r"(bases[i.value])); // or the compiler computes all of them from one
        });
    }
};

template <int Bits, int Tiles, int Tokens> void multiply_block(const IntWeight &w, const Input &x, const Block &block) {
    const bool channel = w.scale_layout == ScaleLayout::channel;
    const std::uint8_t *codes = block.codes;
    alignas(kLineBytes) float totals[Tokens][Tiles * kTileRows] = {};
    const std::size_t first = block.token * x.groups + block.first_group;
    RowPointers<Tokens> values(x.codes + block.token * x.code_stride + block.first_group * w.group, x.code_stride);
    RowPointers<Tokens> starts(x.starts + first, 4 * x.groups), scales(x.scales + first, 4 * x.groups);
    for (std::size_t g = block.first_group; g < block.last_group; ++g) {
        __m512i sums[Tokens][Tiles];
        each<Tokens>([&](auto m) FEWBIT_INLINE {
            __m512i start = broadcast4(starts.at(m));
            if (block.sixteenfold) start = _mm512_slli_epi32(start, 4);
            each<Tiles>([&](auto t) FEWBIT_INLINE { sums[m.value][t.value] = start; });
        });
        const std::uint8_t *const end = codes + w.group * kTileRows * Bits / 8;
        for (; codes != end; values.advance(Bits == 4 ? 8 : 4), codes += kLineBytes) {
            __m512i lines[Tiles], low[Tiles];
            each<Tiles>([&](auto t) FEWBIT_INLINE {
                const __m512i line = _mm512_load_si512(codes + t.value * block.tile_bytes);
                low[t.value] = Bits == 4 ? field(line, 0x0f) : line;
                if constexpr (Bits == 4) lines[t.value] = field(_mm512_srli_epi32(line, 4), 0x0f);
            });
            each<Tokens>([&](auto m) FEWBIT_INLINE {
                const __m512i some = broadcast4(values.at(m));
                each<Tiles>([&](auto t) FEWBIT_INLINE { dot_in_place(sums[m.value][t.value], low[t.value], some); });
            });
            if constexpr (Bits == 4) {
                each<Tokens>([&](auto m) FEWBIT_INLINE {
                    const __m512i some = broadcast4(values.at(m) + 4);
                    each<Tiles>([&](auto t) FEWBIT_INLINE { dot_in_place(sums[m.value][t.value], lines[t.value], some); });
                });
            }
        }
        if (!channel && w.zeros != nullptr) {
            each<Tokens>([&](auto m) FEWBIT_INLINE {
                const std::int32_t *sum = x.sums + (block.token + m.value) * x.groups + g;
                each<Tiles>([&](auto t) FEWBIT_INLINE {
                    __m512i &all = sums[m.value][t.value];
                    all = _mm512_sub_epi32(all, zero_correction(w, block.tile + t.value, g, sum));
                });
            });
        }
        __m512 scale[Tiles];
        each<Tiles>([&](auto t) FEWBIT_INLINE { scale[t.value] = channel ? _mm512_set1_ps(1.0f) : group_scale(w, block.tile + t.value, g); });
        each<Tokens>([&](auto m) FEWBIT_INLINE {
            const __m512 x_scale = _mm512_castsi512_ps(broadcast4(scales.at(m)));
            each<Tiles>([&](auto t) FEWBIT_INLINE {
                float *to = totals[m.value] + t.value * kTileRows;
                const __m512 sum = _mm512_cvtepi32_ps(sums[m.value][t.value]), both = _mm512_mul_ps(scale[t.value], x_scale);
                _mm512_store_ps(to, _mm512_fmadd_ps(sum, both, _mm512_load_ps(to)));
            });
        });
        starts.advance(sizeof(std::int32_t));
        scales.advance(sizeof(float));
    }
    put<Tiles, Tokens>(block, totals);
}

using BlockFunction = void (*)(const IntWeight &, const Input &, const Block &);

template <int Bits>
constexpr BlockFunction kBlocks[kTokens] = {
    multiply_block<Bits, 2, 1>, multiply_block<Bits, 2, 2>,  multiply_block<Bits, 2, 3>,  multiply_block<Bits, 2, 4>,
    multiply_block<Bits, 2, 5>, multiply_block<Bits, 2, 6>,  multiply_block<Bits, 2, 7>,  multiply_block<Bits, 2, 8>,
    multiply_block<Bits, 2, 9>, multiply_block<Bits, 2, 10>, multiply_block<Bits, 2, 11>, multiply_block<Bits, 2, 12>};

// For a last tile without a neighbour, which is rare: few sizes, or compiling them takes as long as all the others.
constexpr std::size_t kLoneTokens = 3;
template <int Bits>
constexpr BlockFunction kLoneBlocks[kLoneTokens] = {multiply_block<Bits, 1, 1>, multiply_block<Bits, 1, 2>, multiply_block<Bits, 1, 3>};

// All tokens in register blocks of about equal size.
template <int Bits> void all_tokens(const IntWeight &w, const Input &x, Block block) {
    const bool lone = block.rows <= kTileRows;
    const std::size_t most = lone ? kLoneTokens : kTokens, blocks = (x.rows + most - 1) / most;
    float *const y = block.y;
    for (std::size_t i = 0; i < blocks; ++i) {
        block.token = x.rows * i / blocks;
        block.y = y + block.token * block.y_stride;
        const std::size_t tokens = x.rows * (i + 1) / blocks - block.token;
        (lone ? kLoneBlocks<Bits> : kBlocks<Bits>)[tokens - 1](w, x, block);
    }
}

// Lines of packed codes to lines of bytes with offset 8. `lines` are those of the packed codes.
template <int Bits> void spread(const std::uint8_t *codes, std::size_t lines, std::uint8_t *out) {
    const auto put = [&out](__m512i line, int mask, int add) {
        _mm512_store_si512(out, _mm512_add_epi8(field(line, mask), _mm512_set1_epi8(char(add))));
        out += kLineBytes;
    };
    if constexpr (Bits == 3) {
        for (std::size_t i = 0; i < lines; i += 3, codes += 3 * kLineBytes) {
            const __m512i third = line_at(codes, 2);
            for (std::size_t j = 0; j < 3; ++j) {
                put(line_at(codes, j), 0x07, 4);
                put(_mm512_srli_epi32(line_at(codes, j), 3), 0x07, 4);
            }
            put(_mm512_srli_epi32(join(line_at(codes, 0), _mm512_srli_epi32(third, 1)), 5), 0x07, 4);
            put(_mm512_srli_epi32(join(line_at(codes, 1), _mm512_srli_epi32(third, 2)), 5), 0x07, 4);
        }
    } else {
        constexpr int kFields = 8 / Bits, kMask = (1 << Bits) - 1, kAdd = 8 - (1 << (Bits - 1));
        for (std::size_t i = 0; i < lines; ++i, codes += kLineBytes) {
            for (int f = 0; f < kFields; ++f) put(_mm512_srli_epi32(line_at(codes, 0), unsigned(f * Bits)), kMask, kAdd);
        }
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
    constexpr bool kDirect = Bits == 4 || Bits == 8; // multiply_block reads these without help
    const std::size_t group_bytes = w.group * kTileRows * Bits / 8;
    const bool spreads = !kDirect || (Bits == 4 && x.rows > kDirectTokens && w.group <= kBlock);
    const std::size_t step = spreads || (x.rows > kTokens && w.group <= kBlock) ? kBlock / w.group : w.groups;
    alignas(kLineBytes) std::uint8_t scratch[Bits != 8 ? 2 * kTileRows * kBlock : 1];
    for (std::size_t first = begin; first < end; first += 2 * kTileRows) {
        Block block{};
        block.tile = first / kTileRows;
        block.rows = least(2 * kTileRows, end - first);
        block.y = y + first;
        block.y_stride = y_stride;
        block.sixteenfold = Bits == 8;
        for (std::size_t g = 0; g < w.groups; g += step) {
            block.first_group = g;
            block.last_group = least(g + step, w.groups);
            block.codes = w.codes + block.tile * w.code_stride + g * group_bytes;
            block.tile_bytes = w.code_stride;
            if (spreads) {
                const std::size_t bytes = (block.last_group - g) * group_bytes;
                for (std::size_t t = 0; t * kTileRows < block.rows; ++t) {
                    spread<Bits == 8 ? 4 : Bits>(block.codes + t * w.code_stride, bytes / kLineBytes, scratch + t * (bytes * 8 / Bits));
                }
                block.codes = scratch;
                block.tile_bytes = bytes * 8 / Bits;
                all_tokens<8>(w, x, block);
            } else {
                all_tokens<kDirect ? Bits : 8>(w, x, block);
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

constexpr IntKernels kKernels{"avx512-vnni", multiply<2>, multiply<3>, multiply<4>, multiply<8>};

} // namespace

const IntKernels &int_kernels_avx512_vnni() { return kKernels; }

} // namespace fewbit
