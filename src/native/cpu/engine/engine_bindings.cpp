// The engine's Python face; its types are written down in src/fewbit/_native.pyi, and src/fewbit/runtime/engine.py is what uses it.

#include "engine_bindings.hpp"

#include "engine.hpp"
#include "reference_linear.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace fewbit::engine {
namespace {

template <typename T, std::size_t Dimensions> using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Floats = Array<const float, 1>;
using Bias = std::optional<Floats>;

void check(bool holds, const char *message) {
    if (!holds) throw std::invalid_argument(message);
}

KvKind kind_of(const std::string &name) {
    if (name == "none") return KvKind::none;
    if (name == "float32") return KvKind::float32;
    if (name == "bfloat16") return KvKind::bfloat16;
    if (name == "int8") return KvKind::int8;
    if (name == "fp8") return KvKind::fp8;
    if (name == "int4") return KvKind::int4;
    throw std::invalid_argument("unknown KV format " + name);
}

Rows embedding_of(const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro> &array) {
    const nb::dlpack::dtype type = array.dtype();
    const bool float32 = type == nb::dtype<float>();
    check(float32 || (type.code == std::uint8_t(nb::dlpack::dtype_code::Bfloat) && type.bits == 16), "the embedding is float32 or bfloat16");
    return {array.data(), float32 ? Type::float32 : Type::bfloat16, array.shape(0), array.shape(1), array.shape(1)};
}

const float *vector_of(const Bias &array, std::size_t size, const char *message) {
    if (!array) return nullptr;
    check(array->shape(0) == size, message);
    return array->data();
}

Projection projection_of(const Linear &linear, const Bias &bias) {
    return {&linear, vector_of(bias, linear.out_features, "a bias has not out_features entries")};
}

Layer layer_of(std::size_t hidden, std::size_t dim, const Floats &input_norm, const Floats &post_norm, const Bias &query_norm,
               const Bias &key_norm, const std::vector<const Linear *> &linears, const std::vector<Bias> &biases, std::size_t sliding) {
    check(linears.size() == 7 && biases.size() == 7, "a layer has seven linears and as many biases: q, k, v, o, gate, up, down");
    for (const Linear *linear : linears) check(linear != nullptr, "a linear is None");
    Layer l;
    l.input_norm = vector_of(input_norm, hidden, "a norm has not as many weights as there are hidden channels");
    l.post_norm = vector_of(post_norm, hidden, "a norm has not as many weights as there are hidden channels");
    l.query_norm = vector_of(query_norm, dim, "a norm has not as many weights as the head dimension");
    l.key_norm = vector_of(key_norm, dim, "a norm has not as many weights as the head dimension");
    Projection *projections[7] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down};
    for (int i = 0; i < 7; ++i) *projections[i] = projection_of(*linears[i], biases[i]);
    l.sliding = sliding;
    return l;
}

Rotary rotary_of(const Array<const float, 2> &cosine, const Array<const float, 2> &sine, std::size_t dim) {
    check(cosine.shape(1) == dim / 2 && sine.shape(1) == dim / 2 && sine.shape(0) == cosine.shape(0), "cosine and sine are not [positions, dim / 2]");
    return {cosine.data(), sine.data(), cosine.shape(0)};
}

void prefill(Engine &engine, Cache &cache, const Array<const float, 2> &cosine, const Array<const float, 2> &sine, std::size_t sequence,
             const Array<const std::int64_t, 1> &tokens, const Array<float, 2> &logits, const Array<std::int64_t, 1> &best) {
    const std::size_t count = tokens.shape(0), rows = logits.shape(0);
    check(count >= 1 && (rows == 1 || rows == count), "logits have neither one row nor a row for each token");
    check(logits.shape(1) == engine.shape().vocabulary && best.shape(0) == rows, "logits are not [rows, vocabulary], best [rows]");
    const Rotary rotary = rotary_of(cosine, sine, engine.shape().dim);
    nb::gil_scoped_release released;
    engine.prefill(cache, rotary, sequence, tokens.data(), count, rows == count, logits.data(), best.data());
}

void decode(Engine &engine, Cache &cache, const Array<const float, 2> &cosine, const Array<const float, 2> &sine,
            const Array<const std::int64_t, 1> &tokens, const Array<float, 2> &logits, const Array<std::int64_t, 1> &best) {
    const std::size_t count = tokens.shape(0);
    check(count >= 1 && logits.shape(0) == count && logits.shape(1) == engine.shape().vocabulary && best.shape(0) == count,
          "logits are not [tokens, vocabulary], best [tokens]");
    const Rotary rotary = rotary_of(cosine, sine, engine.shape().dim);
    nb::gil_scoped_release released;
    engine.decode(cache, rotary, tokens.data(), count, logits.data(), best.data());
}

}  // namespace

void bind_engine(nb::module_ &m) {
    m.def("engine_instruction_set", [] { return kernels().name; }, "The instruction set of the engine's own kernels.");

    m.def(
        "reference_linear",
        [](const Array<const float, 2> &weight) { return make_reference_linear(weight.data(), weight.shape(0), weight.shape(1)); },
        "weight"_a, nb::keep_alive<0, 1>(), "A float32 weight, multiplied the plain way, for tests.");

    nb::class_<Cache>(m, "EngineCache")
        .def(
            "__init__",
            [](Cache *self, std::size_t layers, std::size_t sequences, std::size_t kv_heads, std::size_t dim, std::size_t capacity,
               const std::string &history, const std::string &window, std::size_t window_tokens) {
                new (self) Cache({layers, sequences, kv_heads, dim, capacity, kind_of(history), kind_of(window), window_tokens});
            },
            "layers"_a, "sequences"_a, "kv_heads"_a, "dim"_a, "capacity"_a, "history"_a, "window"_a, "window_tokens"_a)
        .def(
            "length",
            [](const Cache &cache, std::size_t sequence) {
                check(sequence < cache.shape().sequences, "no such sequence");
                return cache.length(sequence);
            },
            "sequence"_a)
        .def("crop", &Cache::crop, "sequence"_a, "length"_a)
        .def("fill", &Cache::fill, "sequence"_a, "length"_a, "For timings: the sequence has `length` tokens of arbitrary finite values.")
        .def_prop_ro("capacity", [](const Cache &cache) { return cache.shape().capacity; })
        .def_prop_ro("sequences", [](const Cache &cache) { return cache.shape().sequences; })
        .def_prop_ro("nbytes", &Cache::bytes)
        .def_prop_ro("bytes_per_token", &Cache::bytes_per_token)
        .def_prop_ro("constant_bytes", &Cache::constant_bytes);

    nb::class_<Layer>(m, "EngineLayer");
    m.def("engine_layer", &layer_of, "hidden"_a, "dim"_a, "input_norm"_a, "post_norm"_a, "query_norm"_a.none(), "key_norm"_a.none(), "linears"_a,
          "biases"_a, "sliding"_a);

    nb::class_<Times>(m, "EngineTimes")
        .def_ro("total", &Times::total)
        .def_ro("attention_projections", &Times::attention_projections)
        .def_ro("attention", &Times::attention)
        .def_ro("ffn", &Times::ffn)
        .def_ro("head", &Times::head)
        .def_ro("layers", &Times::layers);

    nb::class_<Engine>(m, "Engine")
        .def(
            "__init__",
            [](Engine *self, const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro> &embedding, std::vector<Layer> layers,
               const Floats &final_norm, const Linear &head, const Bias &head_bias, std::size_t heads, std::size_t kv_heads, std::size_t dim,
               std::size_t intermediate, float epsilon, float scale, bool bf16) {
                const Rows rows = embedding_of(embedding);
                const Shape shape{rows.columns, heads, kv_heads, dim, intermediate, rows.rows, epsilon, scale, bf16};
                const float *norm = vector_of(final_norm, rows.columns, "the final norm has not as many weights as there are hidden channels");
                new (self) Engine(shape, rows, std::move(layers), norm, projection_of(head, head_bias));
            },
            "embedding"_a, "layers"_a, "final_norm"_a, "head"_a, "head_bias"_a.none(), "heads"_a, "kv_heads"_a, "dim"_a, "intermediate"_a,
            "epsilon"_a, "scale"_a, "bf16"_a)
        .def("prefill", &prefill, "cache"_a, "cosine"_a, "sine"_a, "sequence"_a, "tokens"_a, "logits"_a, "best"_a)
        .def("decode", &decode, "cache"_a, "cosine"_a, "sine"_a, "tokens"_a, "logits"_a, "best"_a)
        .def_prop_ro("times", [](const Engine &engine) { return engine.times(); })
        .def("set_emptied", &Engine::set_emptied, "emptied"_a);
}

}  // namespace fewbit::engine
