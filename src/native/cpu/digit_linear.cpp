#include "digit_linear.hpp"

#include "cpu_features.hpp"

#include <stdexcept>

namespace fewbit {
namespace {

struct Named {
    const char *name;
    DigitMultiply multiply;
};

std::vector<Named> available() {
    std::vector<Named> found;
#if defined(FEWBIT_X86)
    if (cpu_features().avx512_vnni) found.push_back({"avx512-vnni", multiply_digits_avx512});
    if (cpu_features().avx2) found.push_back({"avx2", multiply_digits_avx2});
#elif defined(FEWBIT_ARM)
    if (cpu_features().dotprod) found.push_back({"neon-dotprod", multiply_digits_neon_dotprod});
    found.push_back({"neon", multiply_digits_neon});
#endif
    found.push_back({"portable", multiply_digits_portable});
    return found;
}

DigitMultiply choose(const std::string &name) {
    for (const Named &named : available()) {
        if (name.empty() || name == named.name) return named.multiply;
    }
    throw std::invalid_argument("this CPU has no " + name);
}

class DigitLinear final : public Linear {
  public:
    DigitLinear(const DigitWeight &weight, DigitMultiply multiply) : Linear(weight.out, weight.in), weight_(weight), multiply_(multiply) {}

    InputFormat input_format(std::size_t) const override { return {InputKind::int24_groups, weight_.block}; }
    std::size_t tile() const override { return 2 * kTile; } // two tiles share the broadcasts of their inputs

    std::size_t bytes() const override {
        const std::size_t tiles = (out_features + kTile - 1) / kTile;
        return tiles * weight_.groups * (weight_.header_bytes + weight_.blocks * weight_.block_bytes);
    }

    void multiply(const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) const override {
        multiply_(weight_, x, y, y_stride, begin / kTile, (end + kTile - 1) / kTile);
    }

  private:
    DigitWeight weight_;
    DigitMultiply multiply_;
};

} // namespace

std::vector<std::string> digit_instruction_sets() {
    std::vector<std::string> names;
    for (const Named &named : available()) names.emplace_back(named.name);
    return names;
}

std::size_t digit_header_bytes(ScaleType scale_type, bool affine) {
    const std::size_t scale = scale_type == ScaleType::float32 ? 4 : scale_type == ScaleType::bfloat16 ? 2 : 1;
    return kTile * (scale + (affine ? 1 : 0));
}

std::size_t digit_block_bytes(DigitFormat format, std::size_t block) {
    switch (format) {
    case DigitFormat::int8: return kTile * block;
    case DigitFormat::int3: return kTile * block * 3 / 8;
    case DigitFormat::int2: return kTile * block / 4;
    default: return kTile * block / 2;
    }
}

std::unique_ptr<Linear> make_digit_linear(DigitWeight weight, const std::string &instruction_set) {
    const std::size_t multiple = weight.format == DigitFormat::int3 ? 32 : 16;
    if (weight.block == 0 || weight.block % multiple != 0 || weight.block > 128) {
        throw std::invalid_argument("a block is not a multiple of 16 columns (INT3: 32) up to 128");
    }
    const std::size_t group = weight.block * weight.blocks;
    if (group == 0 || weight.groups != (weight.in + group - 1) / group) throw std::invalid_argument("the groups do not cover in_features");
    weight.header_bytes = digit_header_bytes(weight.scale_type, weight.affine);
    weight.block_bytes = digit_block_bytes(weight.format, weight.block);
    return std::make_unique<DigitLinear>(weight, choose(instruction_set));
}

} // namespace fewbit
