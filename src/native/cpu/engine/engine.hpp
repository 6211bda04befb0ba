// The forward pass of a Llama-like decoder (Llama, Mistral, Qwen2, Qwen3) over linears in any format; see engine.cpp.
#pragma once

#include "../linear.hpp"
#include "../prepare.hpp"
#include "../thread_pool.hpp"
#include "cache.hpp"
#include "kernels.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fewbit::engine {

struct Projection {
    const Linear *linear = nullptr;
    const float *bias = nullptr;  // [out_features] or null
};

struct Layer {
    const float *input_norm = nullptr, *post_norm = nullptr;  // [hidden]
    const float *query_norm = nullptr, *key_norm = nullptr;   // [dim], Qwen3; or null
    Projection q, k, v, o, gate, up, down;
    std::size_t sliding = 0;  // tokens that a position sees, itself included; 0: all
};

struct Shape {
    std::size_t hidden, heads, kv_heads, dim, intermediate, vocabulary;
    float epsilon, scale;  // of the norms; of the scores
    bool bf16;             // round activations to BF16 where a BF16 model does
};

// Cosine and sine of the rotary embedding, [positions, dim / 2]; position p's row is read when a token at p is run.
struct Rotary {
    const float *cosine, *sine;
    std::size_t positions;
};

// Milliseconds of the latest forward pass.
struct Times {
    double total = 0, attention_projections = 0, attention = 0, ffn = 0, head = 0, layers = 0;
};

class Engine {
  public:
    // `embedding` is [vocabulary, hidden]. Pointers and linears belong to the caller. Throws std::invalid_argument when shapes do not fit.
    Engine(const Shape &shape, const Rows &embedding, std::vector<Layer> layers, const float *final_norm, const Projection &head);

    const Shape &shape() const { return shape_; }
    std::size_t layers() const { return layers_.size(); }

    // Appends `count` tokens to one sequence (prefill). Logits after the last of them, or after each: [1 or count, vocabulary].
    void prefill(Cache &cache, const Rotary &rotary, std::size_t sequence, const std::int64_t *tokens, std::size_t count, bool every,
                 float *logits, std::int64_t *best);
    // Appends one token to each of the first `count` sequences. logits: [count, vocabulary].
    void decode(Cache &cache, const Rotary &rotary, const std::int64_t *tokens, std::size_t count, float *logits, std::int64_t *best);

    const Times &times() const { return times_; }
    // Leaves out every product with a weight: what remains is the engine's own overhead.
    void set_emptied(bool emptied) { emptied_ = emptied; }

  private:
    enum Stage { kQkv, kOut, kGateUp, kDown, kHead, kStages };

    // One call of `pass`: rows are tokens of one sequence (prefill), or one token of each sequence (decode).
    struct Pass {
        Cache *cache;
        Rotary rotary;
        const std::int64_t *tokens;
        std::size_t rows, sequence, final_length;
        bool decode, every;
        float *logits;
        std::int64_t *best;
    };
    // The inputs of a stage: one PreparedInput per format, for all threads or one per thread.
    struct Prepared {
        InputFormat format;
        std::vector<PreparedInput> inputs;
    };
    struct StagePlan {
        std::size_t rows = 0, columns = 0;
        std::vector<Prepared> prepared;
    };
    struct Best {
        float value;
        std::int64_t index;
    };
    // Features [begin, end) of a product; empty: none are left.
    struct Piece {
        std::size_t begin, end;
    };

    void check_shapes() const;
    void pass(const Pass &p);
    void plan(const Pass &p);
    void plan_stage(Stage stage, std::size_t rows, std::size_t columns);
    std::vector<const Linear *> linears_of(Stage stage) const;
    void reserve_buffers(std::size_t rows, std::size_t head_rows, std::size_t splits);

    void run_thread(const Pass &p, std::size_t thread);
    void embed(const Pass &p, std::size_t thread);
    void prepare(Stage stage, const float *x, std::size_t rows, const float *norm, std::initializer_list<const Linear *> linears,
                 std::size_t thread);
    const Input &input_for(Stage stage, const Linear &linear, std::size_t thread) const;
    void multiply(Stage stage, const Projection &projection, float *y, std::size_t stride, const Piece &piece, std::size_t thread);
    void qkv(const Layer &layer, std::size_t rows, std::size_t thread);
    void into_residual(Stage stage, const Projection &projection, std::size_t rows, std::size_t thread);
    void gate_up(const Layer &layer, std::size_t rows, std::size_t thread);
    PreparedInput *activated_as_codes(const Layer &layer, std::size_t rows);
    void head(const Pass &p, std::size_t rows, std::size_t thread);
    Piece take(std::atomic<std::size_t> &counter, std::size_t features, std::size_t unit, std::size_t rows) const;
    float *own_results(std::size_t thread) const;

    // engine_attention.cpp
    void attention_decode(const Pass &p, std::size_t layer, std::size_t thread);
    void attention_prefill(const Pass &p, std::size_t layer, std::size_t thread);
    void rotate_row(const Layer &layer, const Pass &p, std::size_t row, std::size_t position, std::size_t first_kv, std::size_t last_kv);
    void put_decode(const Pass &p, std::size_t layer, std::size_t row, std::size_t kv_head);
    Attention attention_of(const Pass &p, const KvHead &head, std::size_t kv_head, std::size_t sequence, std::size_t row, std::size_t count,
                           std::size_t thread) const;
    void merge_parts(const Pass &p, std::size_t head);

    std::atomic<std::size_t> &next_counter(std::size_t thread);

    Shape shape_;
    Rows embedding_;
    std::vector<Layer> layers_;
    const float *final_norm_;
    Projection head_;
    const Kernels &kernels_;
    std::size_t query_width_, kv_width_, qkv_width_;
    bool emptied_ = false;

    // Of the pass that runs.
    std::size_t threads_ = 1, rows_ = 0, head_rows_ = 0, splits_ = 1;
    StagePlan stages_[kStages];
    AlignedBuffer x_, qkv_, attended_, activated_, parts_, part_statistics_;
    std::vector<AlignedBuffer> scratch_, results_; // of each thread
    std::unique_ptr<std::atomic<std::size_t>[]> counters_;
    std::size_t counter_count_;
    struct alignas(64) PerThread {
        std::size_t counter;
        std::vector<Best> best;
    };
    std::vector<PerThread> per_thread_;
    Times times_;
};

}  // namespace fewbit::engine
