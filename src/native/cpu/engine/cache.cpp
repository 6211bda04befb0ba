#include "cache.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace fewbit::engine {
namespace {

constexpr std::size_t kLine = 64;

std::size_t bytes_of(KvKind kind, std::size_t values) {
    switch (kind) {
        case KvKind::float32: return values * 4;
        case KvKind::bfloat16: return values * 2;
        case KvKind::int8:
        case KvKind::fp8: return values;
        case KvKind::int4: return values / 2;
        default: return 0;
    }
}

void check(bool holds, const char *message) {
    if (!holds) throw std::invalid_argument(message);
}

}  // namespace

void Cache::Free::operator()(char *memory) const { std::free(memory); }

Cache::Layout Cache::layout_of(const CacheShape &s) {
    check(s.layers && s.sequences && s.kv_heads && s.capacity, "a KV cache has at least one layer, sequence, head and token");
    check(s.dim % 2 == 0 && s.dim >= 2 && s.dim <= 512, "the head dimension is an even number up to 512");
    check(s.window == KvKind::float32 || s.window == KvKind::bfloat16, "the window is in float32 or bfloat16");
    check(s.history != KvKind::float32 && s.history != KvKind::bfloat16, "the history is quantized");
    check(s.history != KvKind::int4 || s.dim % kInt4Group == 0, "an INT4 cache needs a head dimension that 32 divides");
    const std::size_t capacity = padded(s.capacity);
    Layout l{};
    l.groups = s.history == KvKind::int4 ? s.dim / kInt4Group : 1;
    l.ring = s.history == KvKind::none ? capacity : padded(s.window_tokens);
    std::size_t at = 0;
    const auto part = [&](std::size_t bytes) {
        const std::size_t offset = at;
        at += (bytes + kLine - 1) / kLine * kLine;
        return offset;
    };
    const std::size_t scales = s.history == KvKind::none ? 0 : capacity * l.groups;
    l.keys = part(bytes_of(s.history, capacity * s.dim));
    l.values = part(bytes_of(s.history, capacity * s.dim));
    l.key_scales = part(scales * 2);
    l.value_scales = part(scales * 2);
    l.key_zeros = part(s.history == KvKind::int4 ? scales : 0);
    l.value_zeros = part(s.history == KvKind::int4 ? scales : 0);
    l.window_keys = part(bytes_of(s.window, l.ring * s.dim));
    l.window_values = part(bytes_of(s.window, l.ring * s.dim));
    l.bytes = at;
    return l;
}

Cache::Cache(const CacheShape &shape)
    : shape_(shape), layout_(layout_of(shape)), bytes_(layout_.bytes * shape.layers * shape.sequences * shape.kv_heads),
      lengths_(shape.sequences, 0), histories_(shape.sequences, 0) {
    // calloc: large blocks come as pages that exist once they are written to, and blocks of keys beyond the last token read as zeros.
    memory_.reset(static_cast<char *>(std::calloc(bytes_ + kLine, 1)));
    if (!memory_) throw std::bad_alloc();
    first_ = memory_.get() + (kLine - reinterpret_cast<std::uintptr_t>(memory_.get()) % kLine) % kLine;
}

KvHead Cache::head(std::size_t layer, std::size_t sequence, std::size_t kv_head) const {
    char *base = first_ + ((layer * shape_.sequences + sequence) * shape_.kv_heads + kv_head) * layout_.bytes;
    const auto at = [&](std::size_t offset) { return static_cast<void *>(base + offset); };
    return {shape_.history,
            shape_.window,
            shape_.dim,
            layout_.groups,
            layout_.ring,
            at(layout_.keys),
            at(layout_.values),
            static_cast<std::uint16_t *>(at(layout_.key_scales)),
            static_cast<std::uint16_t *>(at(layout_.value_scales)),
            static_cast<std::int8_t *>(at(layout_.key_zeros)),
            static_cast<std::int8_t *>(at(layout_.value_zeros)),
            at(layout_.window_keys),
            at(layout_.window_values)};
}

std::size_t Cache::history_at(std::size_t sequence, std::size_t length) const {
    if (shape_.history == KvKind::none) return 0;
    const std::size_t left = length > shape_.window_tokens ? length - shape_.window_tokens : 0;
    return std::max(left, histories_[sequence]);
}

void Cache::grow_to(std::size_t sequence, std::size_t length) {
    histories_[sequence] = history_at(sequence, length);
    lengths_[sequence] = length;
}

void Cache::crop(std::size_t sequence, std::size_t length) {
    check(sequence < shape_.sequences, "no such sequence");
    check(length <= lengths_[sequence], "a cache can only be cropped to fewer tokens than it has");
    lengths_[sequence] = length;
    histories_[sequence] = std::min(histories_[sequence], length);
}

void Cache::fill(std::size_t sequence, std::size_t length) {
    check(sequence < shape_.sequences, "no such sequence");
    check(length <= shape_.capacity, "the cache has no room for the tokens");
    constexpr int kPattern = 0x3c;  // 0.01 in BF16 and float32, 1.5 in FP8, 60 in INT8
    for (std::size_t layer = 0; layer < shape_.layers; ++layer)
        std::memset(first_ + (layer * shape_.sequences + sequence) * shape_.kv_heads * layout_.bytes, kPattern, shape_.kv_heads * layout_.bytes);
    histories_[sequence] = 0;
    grow_to(sequence, length);
}

double Cache::bytes_per_token() const {
    const KvKind kind = shape_.history == KvKind::none ? shape_.window : shape_.history;
    const double values = static_cast<double>(bytes_of(kind, 2 * shape_.dim));
    const double scales = shape_.history == KvKind::none ? 0.0 : 2.0 * static_cast<double>(layout_.groups) * (shape_.history == KvKind::int4 ? 3 : 2);
    return (values + scales) * static_cast<double>(shape_.layers * shape_.kv_heads);
}

std::size_t Cache::constant_bytes() const {
    return shape_.history == KvKind::none ? 0 : 2 * bytes_of(shape_.window, layout_.ring * shape_.dim) * shape_.layers * shape_.kv_heads;
}

}  // namespace fewbit::engine
