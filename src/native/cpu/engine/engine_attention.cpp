// The engine's attention: rotary embedding, the cache, and which thread looks at which queries and keys. The arithmetic is attention.inc's.

#include "engine.hpp"

#include <algorithm>
#include <cmath>

namespace fewbit::engine {
namespace {

float *floats(const AlignedBuffer &buffer) { return static_cast<float *>(buffer.data()); }

}  // namespace

// Norms and rotates the queries and keys of some key heads of one row.
void Engine::rotate_row(const Layer &layer, const Pass &p, std::size_t row, std::size_t position, std::size_t first_kv, std::size_t last_kv) {
    const std::size_t dim = shape_.dim, group = shape_.heads / shape_.kv_heads;
    const float *cosine = p.rotary.cosine + position * (dim / 2), *sine = p.rotary.sine + position * (dim / 2);
    const auto each = [&](float *first, std::size_t heads, const float *norm) {
        for (std::size_t i = 0; i < heads; ++i) {
            float *head = first + i * dim;
            if (norm != nullptr) kernels_.rms_norm(head, norm, dim, shape_.epsilon, shape_.bf16, head);
            kernels_.rotate(head, cosine, sine, dim, shape_.bf16);
        }
    };
    float *values = floats(qkv_) + row * qkv_width_;
    each(values + first_kv * group * dim, (last_kv - first_kv) * group, layer.query_norm);
    each(values + query_width_ + first_kv * dim, last_kv - first_kv, layer.key_norm);
}

Attention Engine::attention_of(const Pass &p, const KvHead &head, std::size_t kv_head, std::size_t sequence, std::size_t row,
                               std::size_t count, std::size_t thread) const {
    const std::size_t group = shape_.heads / shape_.kv_heads, length = p.cache->length(sequence);
    Attention a{};
    a.head = &head;
    a.history = p.cache->history_at(sequence, p.decode ? length + 1 : p.final_length);
    a.queries = floats(qkv_) + row * qkv_width_ + kv_head * group * shape_.dim;
    a.out = floats(attended_) + row * query_width_ + kv_head * group * shape_.dim;
    a.stride = qkv_width_;
    a.out_stride = query_width_;
    a.heads = group;
    a.first = p.decode ? length : length + row;
    a.count = count;
    a.begin = 0;
    a.end = a.first + count;
    a.scale = shape_.scale;
    a.bf16 = shape_.bf16;
    a.scratch = floats(scratch_[thread]);
    return a;
}

// --------------------------------------------------------------------------------------------------------------------------------- decode

// Puts the newest token of one sequence into the cache; what falls out of the window goes into the history first, since it may lie in the
// very place of the newest one.
void Engine::put_decode(const Pass &p, std::size_t layer, std::size_t row, std::size_t kv_head) {
    const std::size_t position = p.cache->length(row), until = p.cache->history_at(row, position + 1);
    const KvHead head = p.cache->head(layer, row, kv_head);
    for (std::size_t old = p.cache->history(row); old < std::min(until, position); ++old) kernels_.retire(head, old);
    const float *key = floats(qkv_) + row * qkv_width_ + query_width_ + kv_head * shape_.dim, *value = key + kv_width_;
    (until > position ? kernels_.put_history : kernels_.put_window)(head, position, key, value);
}

void Engine::attention_decode(const Pass &p, std::size_t layer, std::size_t thread) {
    const std::size_t kv_heads = shape_.kv_heads, units = p.rows * kv_heads;
    std::atomic<std::size_t> &first = next_counter(thread), &second = next_counter(thread), &third = next_counter(thread);
    for (std::size_t unit; (unit = first.fetch_add(1, std::memory_order_relaxed)) < units;) {
        const std::size_t row = unit / kv_heads, kv_head = unit % kv_heads;
        rotate_row(layers_[layer], p, row, p.cache->length(row), kv_head, kv_head + 1);
        put_decode(p, layer, row, kv_head);
        if (splits_ > 1) continue;
        const KvHead head = p.cache->head(layer, row, kv_head);
        Attention a = attention_of(p, head, kv_head, row, row, 1, thread);
        a.sliding = layers_[layer].sliding;
        kernels_.attend(a);
    }
    if (splits_ == 1) return;
    pool().barrier(thread);
    for (std::size_t unit; (unit = second.fetch_add(1, std::memory_order_relaxed)) < units * splits_;) {
        const std::size_t part = unit / units, row = unit % units / kv_heads, kv_head = unit % kv_heads;
        const KvHead head = p.cache->head(layer, row, kv_head);
        Attention a = attention_of(p, head, kv_head, row, row, 1, thread);
        const std::size_t share = padded((a.end + splits_ - 1) / splits_), statistics = (part * p.rows + row) * shape_.heads;
        a.sliding = layers_[layer].sliding;
        a.begin = std::min(part * share, a.end);
        a.end = std::min(a.begin + share, a.end);
        a.out = floats(parts_) + (part * p.rows + row) * query_width_ + kv_head * a.heads * shape_.dim;
        a.maxima = floats(part_statistics_) + statistics + kv_head * a.heads;
        a.sums = a.maxima + splits_ * p.rows * shape_.heads;
        kernels_.attend(a);
    }
    pool().barrier(thread);
    for (std::size_t head; (head = third.fetch_add(1, std::memory_order_relaxed)) < p.rows * shape_.heads;) merge_parts(p, head);
}

// The output of one head from its parts: each part's sum of e^(s - m) v, brought to the largest m of all.
void Engine::merge_parts(const Pass &p, std::size_t head) {
    const std::size_t heads = p.rows * shape_.heads, dim = shape_.dim;
    const float *maxima = floats(part_statistics_), *sums = maxima + splits_ * heads;
    float largest = maxima[head], total = 0.0f, *out = floats(attended_) + head * dim;
    for (std::size_t part = 1; part < splits_; ++part) largest = std::max(largest, maxima[part * heads + head]);
    std::fill(out, out + dim, 0.0f);
    for (std::size_t part = 0; part < splits_; ++part) {
        const float weight = std::exp(maxima[part * heads + head] - largest);
        const float *values = floats(parts_) + part * heads * dim + head * dim;
        total += weight * sums[part * heads + head];
        for (std::size_t i = 0; i < dim; ++i) out[i] += weight * values[i];
    }
    for (std::size_t i = 0; i < dim; ++i) out[i] /= total;
    kernels_.finish(out, nullptr, dim, shape_.bf16);
}

// -------------------------------------------------------------------------------------------------------------------------------- prefill

void Engine::attention_prefill(const Pass &p, std::size_t layer, std::size_t thread) {
    const std::size_t kv_heads = shape_.kv_heads, length = p.cache->length(p.sequence);
    const std::size_t known = p.cache->history(p.sequence), until = p.cache->history_at(p.sequence, p.final_length);
    std::atomic<std::size_t> &first = next_counter(thread), &second = next_counter(thread), &third = next_counter(thread);
    if (known < std::min(until, length)) {  // what the new tokens push out of the window
        for (std::size_t kv_head; (kv_head = first.fetch_add(1, std::memory_order_relaxed)) < kv_heads;)
            for (std::size_t old = known; old < std::min(until, length); ++old)
                kernels_.retire(p.cache->head(layer, p.sequence, kv_head), old);
        pool().barrier(thread);
    }
    // Blocks of 16 positions: no two threads write to one cache line of keys.
    const std::size_t blocks = padded(length + p.rows) / kBlock - length / kBlock;
    for (std::size_t block; (block = second.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
        const std::size_t from = std::max(length, (length / kBlock + block) * kBlock);
        const std::size_t to = std::min(length + p.rows, (length / kBlock + block + 1) * kBlock);
        for (std::size_t position = from; position < to; ++position) {
            rotate_row(layers_[layer], p, position - length, position, 0, kv_heads);
            const float *key = floats(qkv_) + (position - length) * qkv_width_ + query_width_;
            for (std::size_t kv_head = 0; kv_head < kv_heads; ++kv_head, key += shape_.dim)
                (position < until ? kernels_.put_history : kernels_.put_window)(p.cache->head(layer, p.sequence, kv_head), position, key,
                                                                               key + kv_width_);
        }
    }
    pool().barrier(thread);
    const std::size_t group = shape_.heads / kv_heads, count = std::max<std::size_t>(1, kQueries / group);
    const std::size_t parts = (p.rows + count - 1) / count;
    for (std::size_t unit; (unit = third.fetch_add(1, std::memory_order_relaxed)) < parts * kv_heads;) {
        const std::size_t row = (parts - 1 - unit / kv_heads) * count, kv_head = unit % kv_heads;  // the longest first
        const KvHead head = p.cache->head(layer, p.sequence, kv_head);
        Attention a = attention_of(p, head, kv_head, p.sequence, row, std::min(count, p.rows - row), thread);
        a.sliding = layers_[layer].sliding;
        kernels_.attend(a);
    }
}

}  // namespace fewbit::engine
