// One forward pass: `run_thread` is what each thread does from the embedding to the logits.
//
// A decoder layer is
//
//     h = x + o(attention(rope(q(norm x)), rope(k(norm x)), v(norm x)))        x' = h + down(silu(gate(norm h)) * up(norm h))
//
// At batch 1 a step of a small model takes a few milliseconds for some 170 products with a vector, so what lies between the products must
// cost microseconds. All threads walk through the layers together, in one `run` of the pool, with five barriers per layer: after q/k/v,
// attention, o, gate/up and down. Products are cut into pieces that threads take as they come; whatever follows element by element (bias,
// rounding, residual, activation, its quantization for `down`) is done by the thread that has the piece, while it is in its cache. With a
// single row every thread prepares the inputs of a product for itself, which is cheaper than waiting for a share of it.
//
// The engine knows no formats. A Linear says what inputs it wants, and the inputs of one stage are prepared once per format.

#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>

namespace fewbit::engine {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kChunk = 512;         // tokens of a prompt that pass through the layers at once
constexpr std::size_t kPieceFloats = 32768; // of results of several rows: gate's and up's of both threads of a core stay in its second-level cache
constexpr std::size_t kUnit = 128;          // features of the activation that are quantized together: the largest group of a format but W8A8's
constexpr std::size_t kKeysPerPart = 256;   // fewer keys are not worth a thread of their own

void check(bool holds, const char *message) {
    if (!holds) throw std::invalid_argument(message);
}

// Of a piece of `rows` rows, in units of `unit`.
std::size_t most_features(std::size_t rows, std::size_t unit) { return std::max<std::size_t>(1, kPieceFloats / (rows * unit)) * unit; }

void check_projection(const Projection &p, std::size_t out, std::size_t in, const char *message) {
    check(p.linear != nullptr && p.linear->out_features == out && p.linear->in_features == in, message);
}

}  // namespace

// --------------------------------------------------------------------------------------------------------------------------- construction

Engine::Engine(const Shape &shape, const Rows &embedding, std::vector<Layer> layers, const float *final_norm, const Projection &head)
    : shape_(shape), embedding_(embedding), layers_(std::move(layers)), final_norm_(final_norm), head_(head), kernels_(kernels()),
      query_width_(shape.heads * shape.dim), kv_width_(shape.kv_heads * shape.dim), qkv_width_(query_width_ + 2 * kv_width_),
      counter_count_(layers_.size() * 9 + 1) {
    check_shapes();
    counters_.reset(new std::atomic<std::size_t>[counter_count_]);
}

void Engine::check_shapes() const {
    const Shape &s = shape_;
    check(!layers_.empty() && s.hidden && s.kv_heads && s.heads % s.kv_heads == 0, "query heads are not a multiple of the key heads");
    check(s.heads / s.kv_heads <= kQueries, "too many query heads share the keys of one head");
    check(embedding_.rows == s.vocabulary && embedding_.columns == s.hidden, "the embedding is not [vocabulary, hidden]");
    for (const Layer &l : layers_) {
        check_projection(l.q, query_width_, s.hidden, "q has another shape");
        check_projection(l.k, kv_width_, s.hidden, "k has another shape");
        check_projection(l.v, kv_width_, s.hidden, "v has another shape");
        check_projection(l.o, s.hidden, query_width_, "o has another shape");
        check_projection(l.gate, s.intermediate, s.hidden, "gate has another shape");
        check_projection(l.up, s.intermediate, s.hidden, "up has another shape");
        check_projection(l.down, s.hidden, s.intermediate, "down has another shape");
    }
    check_projection(head_, s.vocabulary, s.hidden, "the head has another shape");
}

// --------------------------------------------------------------------------------------------------------------------------------- passes

void Engine::prefill(Cache &cache, const Rotary &rotary, std::size_t sequence, const std::int64_t *tokens, std::size_t count, bool every,
                     float *logits, std::int64_t *best) {
    const std::size_t final_length = cache.length(sequence) + count;
    for (std::size_t done = 0; done < count;) {
        const std::size_t rows = std::min(kChunk, count - done);
        pass({&cache, rotary, tokens + done, rows, sequence, final_length, false, every, logits, best});
        done += rows;
        if (every) {
            logits += rows * shape_.vocabulary;
            best += rows;
        }
    }
}

void Engine::decode(Cache &cache, const Rotary &rotary, const std::int64_t *tokens, std::size_t count, float *logits, std::int64_t *best) {
    pass({&cache, rotary, tokens, count, 0, 0, true, true, logits, best});
}

void Engine::pass(const Pass &p) {
    const Clock::time_point started = Clock::now();
    const CacheShape &c = p.cache->shape();
    check(c.layers == layers_.size() && c.kv_heads == shape_.kv_heads && c.dim == shape_.dim, "the cache belongs to another model");
    check(p.rows >= 1 && (p.decode ? p.rows : p.sequence + 1) <= c.sequences, "the cache has not that many sequences");
    for (std::size_t row = 0; row < p.rows; ++row)
        check(p.tokens[row] >= 0 && static_cast<std::size_t>(p.tokens[row]) < shape_.vocabulary, "a token is not in the vocabulary");
    std::size_t longest = 0;
    for (std::size_t i = 0; i < (p.decode ? p.rows : 1); ++i)
        longest = std::max(longest, p.cache->length(p.decode ? i : p.sequence) + (p.decode ? 1 : p.rows));
    check(longest <= c.capacity && longest <= p.rotary.positions, "the cache has no room for the tokens");

    plan(p);
    times_ = Times();
    pool().run([&](std::size_t thread) { run_thread(p, thread); });

    for (std::size_t i = 0; i < (p.decode ? p.rows : 1); ++i) {
        const std::size_t sequence = p.decode ? i : p.sequence, length = p.cache->length(sequence) + (p.decode ? 1 : p.rows);
        p.cache->grow_to(sequence, length);
    }
    for (std::size_t row = 0; row < head_rows_; ++row) {
        Best best = per_thread_[0].best[row];
        for (const PerThread &other : per_thread_) {
            const Best b = other.best[row];
            if (b.index >= 0 && (best.index < 0 || b.value > best.value || (b.value == best.value && b.index < best.index) ||
                                 (b.value != b.value && best.value == best.value)))
                best = b;
        }
        p.best[row] = best.index;
    }
    times_.total = std::chrono::duration<double, std::milli>(Clock::now() - started).count();
}

// ------------------------------------------------------------------------------------------------------------------------------- planning

std::vector<const Linear *> Engine::linears_of(Stage stage) const {
    std::vector<const Linear *> all;
    if (stage == kHead) return {head_.linear};
    for (const Layer &l : layers_) {
        if (stage == kQkv) all.insert(all.end(), {l.q.linear, l.k.linear, l.v.linear});
        if (stage == kOut) all.push_back(l.o.linear);
        if (stage == kGateUp) all.insert(all.end(), {l.gate.linear, l.up.linear});
        if (stage == kDown) all.push_back(l.down.linear);
    }
    return all;
}

void Engine::plan_stage(Stage stage, std::size_t rows, std::size_t columns) {
    StagePlan &plan = stages_[stage];
    plan.rows = rows;
    plan.columns = columns;
    plan.prepared.clear();
    for (const Linear *linear : linears_of(stage)) {
        const InputFormat format = linear->input_format(rows);
        const auto same = [&](const Prepared &other) { return other.format == format; };
        if (std::any_of(plan.prepared.begin(), plan.prepared.end(), same)) continue;
        Prepared prepared{format, std::vector<PreparedInput>(rows == 1 ? threads_ : 1)};
        for (PreparedInput &input : prepared.inputs) input.reshape(format, rows, columns, rows == 1 ? 1 : threads_);
        plan.prepared.push_back(std::move(prepared));
    }
}

void Engine::plan(const Pass &p) {
    const std::size_t threads = pool().threads();
    std::size_t head_rows = p.every ? p.rows : 1, longest = 0;
    if (!p.decode && !p.every && p.cache->length(p.sequence) + p.rows < p.final_length) head_rows = 0;  // a later chunk ends the prompt
    std::size_t splits = 1;
    if (p.decode && p.rows * shape_.kv_heads < threads) {
        for (std::size_t i = 0; i < p.rows; ++i) longest = std::max(longest, p.cache->length(i) + 1);
        const std::size_t units = p.rows * shape_.kv_heads;
        splits = std::max<std::size_t>(1, std::min((threads + units - 1) / units, longest / kKeysPerPart));
    }
    const bool same = threads == threads_ && p.rows == rows_ && head_rows == head_rows_ && splits == splits_;
    if (!same) {
        rows_ = 0;  // in case of an exception below
        threads_ = threads;
        plan_stage(kQkv, p.rows, shape_.hidden);
        plan_stage(kOut, p.rows, query_width_);
        plan_stage(kGateUp, p.rows, shape_.hidden);
        plan_stage(kDown, p.rows, shape_.intermediate);
        if (head_rows) plan_stage(kHead, head_rows, shape_.hidden);
        reserve_buffers(p.rows, head_rows, splits);
        rows_ = p.rows;
        head_rows_ = head_rows;
        splits_ = splits;
    }
    for (std::size_t i = 0; i < counter_count_; ++i) counters_[i].store(0, std::memory_order_relaxed);
    for (PerThread &own : per_thread_) {
        own.counter = 0;
        std::fill(own.best.begin(), own.best.end(), Best{0.0f, -1});
    }
}

void Engine::reserve_buffers(std::size_t rows, std::size_t head_rows, std::size_t splits) {
    constexpr std::size_t size = sizeof(float);
    std::size_t widest = kUnit; // unit of a piece
    for (const Layer &l : layers_) {
        widest = std::max({widest, std::lcm(kUnit, std::lcm(l.gate.linear->tile(), l.up.linear->tile())), l.o.linear->tile(), l.down.linear->tile()});
    }
    x_.reserve(rows * shape_.hidden * size);
    qkv_.reserve(rows * qkv_width_ * size);
    attended_.reserve(rows * query_width_ * size);
    activated_.reserve(rows * shape_.intermediate * size);
    parts_.reserve(splits > 1 ? splits * rows * query_width_ * size : 0);
    part_statistics_.reserve(splits > 1 ? 2 * splits * rows * shape_.heads * size : 0);
    scratch_.resize(threads_);
    for (AlignedBuffer &scratch : scratch_) scratch.reserve(attention_scratch(shape_.dim) * size);
    results_.resize(threads_);
    for (AlignedBuffer &results : results_) results.reserve(2 * (rows * widest + kPieceFloats) * size);
    per_thread_.resize(threads_);
    for (PerThread &own : per_thread_) own.best.assign(head_rows, Best{0.0f, -1});
}

// -------------------------------------------------------------------------------------------------------------------------- on all threads

namespace {

float *floats(const AlignedBuffer &buffer) { return static_cast<float *>(buffer.data()); }

// Adds the time since the last mark to a class; only thread 0 looks at the clock.
class Marks {
  public:
    explicit Marks(bool keeps) : keeps_(keeps), last_(keeps ? Clock::now() : Clock::time_point()) {}
    void mark(double &milliseconds) {
        if (!keeps_) return;
        const Clock::time_point now = Clock::now();
        milliseconds += std::chrono::duration<double, std::milli>(now - last_).count();
        last_ = now;
    }

  private:
    bool keeps_;
    Clock::time_point last_;
};

}  // namespace

void Engine::run_thread(const Pass &p, std::size_t thread) {
    ThreadPool &threads = pool();
    Times &times = times_;
    double embedding = 0;
    Marks marks(thread == 0);
    embed(p, thread);
    threads.barrier(thread);
    marks.mark(embedding);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
        const Layer &layer = layers_[l];
        prepare(kQkv, floats(x_), p.rows, layer.input_norm, {layer.q.linear, layer.k.linear, layer.v.linear}, thread);
        qkv(layer, p.rows, thread);
        threads.barrier(thread);
        marks.mark(times.attention_projections);
        p.decode ? attention_decode(p, l, thread) : attention_prefill(p, l, thread);
        threads.barrier(thread);
        marks.mark(times.attention);
        prepare(kOut, floats(attended_), p.rows, nullptr, {layer.o.linear}, thread);
        into_residual(kOut, layer.o, p.rows, thread);
        threads.barrier(thread);
        marks.mark(times.attention_projections);
        prepare(kGateUp, floats(x_), p.rows, layer.post_norm, {layer.gate.linear, layer.up.linear}, thread);
        gate_up(layer, p.rows, thread);
        threads.barrier(thread);
        if (activated_as_codes(layer, p.rows) == nullptr) prepare(kDown, floats(activated_), p.rows, nullptr, {layer.down.linear}, thread);
        into_residual(kDown, layer.down, p.rows, thread);
        threads.barrier(thread);
        marks.mark(times.ffn);
    }
    if (thread == 0) times.layers = times.attention_projections + times.attention + times.ffn;
    if (head_rows_ == 0) return;
    const float *last = floats(x_) + (p.rows - head_rows_) * shape_.hidden;
    prepare(kHead, last, head_rows_, final_norm_, {head_.linear}, thread);
    head(p, head_rows_, thread);
    threads.barrier(thread);
    marks.mark(times.head);
}

std::atomic<std::size_t> &Engine::next_counter(std::size_t thread) { return counters_[per_thread_[thread].counter++]; }

void Engine::embed(const Pass &p, std::size_t thread) {
    for (std::size_t row = p.rows * thread / threads_; row < p.rows * (thread + 1) / threads_; ++row) {
        float *to = floats(x_) + row * shape_.hidden;
        const std::size_t at = static_cast<std::size_t>(p.tokens[row]) * embedding_.stride;
        if (embedding_.type == Type::float32) {
            std::copy_n(static_cast<const float *>(embedding_.data) + at, shape_.hidden, to);
        } else {
            kernels_.embed_bf16(static_cast<const std::uint16_t *>(embedding_.data) + at, shape_.hidden, to);
        }
    }
}

void Engine::prepare(Stage stage, const float *x, std::size_t rows, const float *norm, std::initializer_list<const Linear *> linears,
                     std::size_t thread) {
    StagePlan &plan = stages_[stage];
    const bool alone = rows == 1;  // every thread for itself
    const Rows values{x, Type::float32, rows, plan.columns, plan.columns};
    for (Prepared &prepared : plan.prepared) {
        const auto wants = [&](const Linear *linear) { return linear->input_format(rows) == prepared.format; };
        if (std::none_of(linears.begin(), linears.end(), wants)) continue;
        PreparedInput &input = prepared.inputs[alone ? thread : 0];
        input.fill(values, {norm, shape_.epsilon, shape_.bf16}, alone ? 0 : thread, alone ? 1 : threads_);
    }
    if (!alone) pool().barrier(thread);
}

const Input &Engine::input_for(Stage stage, const Linear &linear, std::size_t thread) const {
    const StagePlan &plan = stages_[stage];
    const InputFormat format = linear.input_format(plan.rows);
    std::size_t i = 0;
    while (!(plan.prepared[i].format == format)) ++i;
    return plan.prepared[i].inputs[plan.rows == 1 ? thread : 0].input();
}

// y[row, begin .. end) = x W^T + bias, rounded. y: [rows, stride], of the product's first output feature.
static void finish_rows(const Kernels &kernels, const Projection &p, float *y, std::size_t stride, std::size_t rows, std::size_t begin,
                        std::size_t end, bool bf16) {
    const float *bias = p.bias == nullptr ? nullptr : p.bias + begin;
    for (std::size_t row = 0; row < rows; ++row) kernels.finish(y + row * stride + begin, bias, end - begin, bf16);
}

void Engine::multiply(Stage stage, const Projection &p, float *y, std::size_t stride, const Piece &piece, std::size_t thread) {
    const std::size_t rows = stages_[stage].rows;
    if (emptied_) {
        for (std::size_t row = 0; row < rows; ++row) std::fill(y + row * stride + piece.begin, y + row * stride + piece.end, 0.0f);
    } else {
        p.linear->multiply(input_for(stage, *p.linear, thread), y, stride, piece.begin, piece.end);
    }
    finish_rows(kernels_, p, y, stride, rows, piece.begin, piece.end, shape_.bf16);
}

// The next piece, in steps of `unit` features. Pieces begin large, for long streams of memory, and end small, so that threads finish together.
Engine::Piece Engine::take(std::atomic<std::size_t> &counter, std::size_t features, std::size_t unit, std::size_t rows) const {
    const std::size_t units = (features + unit - 1) / unit, most = most_features(rows, unit) / unit;
    std::size_t taken = counter.load(std::memory_order_relaxed), count = 0;
    do {
        if (taken >= units) return {features, features};
        const std::size_t share = threads_ == 1 ? units : (units - taken) / (2 * threads_);
        count = std::min(std::max<std::size_t>(share, 1), std::min(most, units - taken));
    } while (!counter.compare_exchange_weak(taken, taken + count, std::memory_order_relaxed));
    return {taken * unit, std::min((taken + count) * unit, features)};
}

float *Engine::own_results(std::size_t thread) const { return floats(results_[thread]); }

void Engine::qkv(const Layer &layer, std::size_t rows, std::size_t thread) {
    float *y = floats(qkv_);
    for (const Projection *p : {&layer.q, &layer.k, &layer.v}) {
        std::atomic<std::size_t> &counter = next_counter(thread);
        const std::size_t features = p->linear->out_features, unit = p->linear->tile();
        for (Piece piece; (piece = take(counter, features, unit, rows)).begin < features;) multiply(kQkv, *p, y, qkv_width_, piece, thread);
        y += features;
    }
}

void Engine::into_residual(Stage stage, const Projection &p, std::size_t rows, std::size_t thread) {
    std::atomic<std::size_t> &counter = next_counter(thread);
    float *own = own_results(thread);
    for (Piece piece; (piece = take(counter, shape_.hidden, p.linear->tile(), rows)).begin < shape_.hidden;) {
        const std::size_t width = piece.end - piece.begin;
        multiply(stage, p, own - piece.begin, width, piece, thread);
        for (std::size_t row = 0; row < rows; ++row) {
            kernels_.add(floats(x_) + row * shape_.hidden + piece.begin, own + row * width, width, shape_.bf16);
        }
    }
}

// Where the activation goes straight into the codes that `down` wants: several rows, and groups that a piece holds whole. A single row is
// quantized by every thread for itself, so that pieces can be smaller than a group.
PreparedInput *Engine::activated_as_codes(const Layer &layer, std::size_t rows) {
    const InputFormat format = layer.down.linear->input_format(rows);
    if (rows == 1 || format.kind == InputKind::float32 || kUnit % format.group != 0) return nullptr;
    for (Prepared &prepared : stages_[kDown].prepared) {
        if (prepared.format == format) return &prepared.inputs[0];
    }
    return nullptr;
}

void Engine::gate_up(const Layer &layer, std::size_t rows, std::size_t thread) {
    std::atomic<std::size_t> &counter = next_counter(thread);
    PreparedInput *codes = activated_as_codes(layer, rows);
    const std::size_t features = shape_.intermediate, tiles = std::lcm(layer.gate.linear->tile(), layer.up.linear->tile());
    const std::size_t unit = codes == nullptr ? tiles : std::lcm(tiles, codes->input().format.group);
    for (Piece piece; (piece = take(counter, features, unit, rows)).begin < features;) {
        const std::size_t width = piece.end - piece.begin;
        float *gate = own_results(thread), *up = gate + rows * width;
        multiply(kGateUp, layer.gate, gate - piece.begin, width, piece, thread);
        multiply(kGateUp, layer.up, up - piece.begin, width, piece, thread);
        for (std::size_t row = 0; row < rows; ++row, gate += width, up += width) {
            float *to = codes == nullptr ? floats(activated_) + row * features + piece.begin : gate;
            kernels_.silu_multiply(gate, up, width, shape_.bf16, to);
            if (codes != nullptr) codes->put(row, piece.begin, gate, width);
        }
    }
}

void Engine::head(const Pass &p, std::size_t rows, std::size_t thread) {
    std::atomic<std::size_t> &counter = next_counter(thread);
    const std::size_t width = shape_.vocabulary;
    for (Piece piece; (piece = take(counter, width, head_.linear->tile(), rows)).begin < width;) {
        multiply(kHead, head_, p.logits, width, piece, thread);
        for (std::size_t row = 0; row < rows; ++row) {
            const float *logits = p.logits + row * width;
            const std::size_t index = piece.begin + kernels_.argmax(logits + piece.begin, piece.end - piece.begin);
            Best &best = per_thread_[thread].best[row];
            // A thread's pieces come in ascending order, so the first of equal values is kept.
            if (best.index < 0 || logits[index] > best.value || (logits[index] != logits[index] && best.value == best.value))
                best = {logits[index], static_cast<std::int64_t>(index)};
        }
    }
}

}  // namespace fewbit::engine
