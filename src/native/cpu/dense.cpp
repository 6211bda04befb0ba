#include "dense.hpp"

#include "cpu_features.hpp"

#include <stdexcept>

namespace fewbit {
namespace {

class DenseLinear final : public Linear {
  public:
    DenseLinear(const DenseWeight &weight, std::size_t out, DenseMultiply multiply)
        : Linear(out, weight.in), weight_(weight), multiply_(multiply) {}

    InputFormat input_format(std::size_t) const override { return {}; }
    std::size_t tile() const override { return 32; }
    std::size_t bytes() const override { return out_features * in_features * (weight_.bfloat16 ? 2 : 4); }

    void multiply(const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) const override {
        multiply_(weight_, x, y, y_stride, begin, end);
    }

  private:
    DenseWeight weight_;
    DenseMultiply multiply_;
};

} // namespace

std::vector<std::string> float_instruction_sets() {
    std::vector<std::string> names;
#if defined(FEWBIT_X86)
    if (cpu_features().avx512) names.emplace_back("avx512");
    if (cpu_features().avx2) names.emplace_back("avx2");
#elif defined(FEWBIT_ARM)
    names.emplace_back("neon");
#endif
    names.emplace_back("portable");
    return names;
}

std::unique_ptr<Linear> make_dense_linear(const DenseWeight &weight, std::size_t out_features, const std::string &instruction_set) {
    for (const std::string &name : float_instruction_sets()) {
        if (!instruction_set.empty() && instruction_set != name) continue;
        DenseMultiply multiply = portable::kDenseMultiply;
#if defined(FEWBIT_X86)
        if (name == "avx2") multiply = avx2::kDenseMultiply;
        if (name == "avx512") multiply = avx512::kDenseMultiply;
#elif defined(FEWBIT_ARM)
        if (name == "neon") multiply = neon::kDenseMultiply;
#endif
        return std::make_unique<DenseLinear>(weight, out_features, multiply);
    }
    throw std::invalid_argument("this CPU has no " + instruction_set);
}

} // namespace fewbit
