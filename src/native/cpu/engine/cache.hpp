// The engine's KV cache: room for a fixed number of tokens, set aside once. Pages that no token has reached yet take no memory.
#pragma once

#include "kernels.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fewbit::engine {

struct CacheShape {
    std::size_t layers, sequences, kv_heads, dim, capacity;
    KvKind history;         // none: everything stays in the window
    KvKind window;          // float32 or bfloat16
    std::size_t window_tokens;  // newest tokens that are not in the history; without meaning when there is none
};

class Cache {
  public:
    // Throws std::invalid_argument for shapes that the kernels do not take, std::bad_alloc.
    explicit Cache(const CacheShape &shape);

    const CacheShape &shape() const { return shape_; }
    KvHead head(std::size_t layer, std::size_t sequence, std::size_t kv_head) const;

    std::size_t length(std::size_t sequence) const { return lengths_[sequence]; }
    // Tokens of a sequence that lie in the history.
    std::size_t history(std::size_t sequence) const { return histories_[sequence]; }
    // Tokens that lie in the history once the sequence has `length` tokens.
    std::size_t history_at(std::size_t sequence, std::size_t length) const;
    void grow_to(std::size_t sequence, std::size_t length);
    // Forgets the newest tokens; what lies in the history stays quantized. Throws std::invalid_argument.
    void crop(std::size_t sequence, std::size_t length);
    // For timings: the sequence has `length` tokens of which nobody asks what they are. Ordinary finite numbers, in memory of their own, so
    // that reading them costs what it always costs. Throws std::invalid_argument.
    void fill(std::size_t sequence, std::size_t length);

    std::size_t bytes() const { return bytes_; }
    double bytes_per_token() const;        // of one sequence, in the long run
    std::size_t constant_bytes() const;    // of one sequence: the window beside a history

  private:
    struct Free {
        void operator()(char *memory) const;
    };
    // Offsets of the parts of one head's memory.
    struct Layout {
        std::size_t groups, ring, keys, values, key_scales, value_scales, key_zeros, value_zeros, window_keys, window_values, bytes;
    };
    static Layout layout_of(const CacheShape &shape);

    CacheShape shape_;
    Layout layout_;
    std::size_t bytes_;
    std::unique_ptr<char, Free> memory_;
    char *first_;
    std::vector<std::size_t> lengths_, histories_;
};

}  // namespace fewbit::engine
