#include "int_linear.hpp"

#include "cpu_features.hpp"

#include <stdexcept>

namespace fewbit {
namespace {

std::vector<const IntKernels *> available() {
    std::vector<const IntKernels *> found;
#if defined(__x86_64__)
    if (cpu_features().avx512_vnni) {
        found.push_back(&int_kernels_avx512_vnni());
        found.push_back(&int_kernels_avx512vl_vnni());
    }
    if (cpu_features().avx_vnni) found.push_back(&int_kernels_avx_vnni());
    if (cpu_features().avx2) found.push_back(&int_kernels_avx2());
#elif defined(__aarch64__)
    if (cpu_features().i8mm) found.push_back(&int_kernels_neon_i8mm());
    if (cpu_features().dotprod) found.push_back(&int_kernels_neon_dotprod());
    found.push_back(&int_kernels_neon());
#endif
    found.push_back(&int_kernels_portable());
    return found;
}

const IntKernels &choose(const std::string &name) {
    for (const IntKernels *kernels : available()) {
        if (name.empty() || name == kernels->name) return *kernels;
    }
    throw std::invalid_argument("this CPU has no " + name);
}

class IntLinear final : public Linear {
  public:
    IntLinear(const IntWeight &weight, const IntLinearOptions &options)
        : Linear(weight.out_features, options.in_features), weight_(weight), bits_(options.bits),
          format_{InputKind::int8_groups, weight.group, options.range, options.static_scale} {
        const IntKernels &kernels = choose(options.instruction_set);
        multiply_ = bits_ == 2 ? kernels.int2 : bits_ == 3 ? kernels.int3 : bits_ == 4 ? kernels.int4 : kernels.int8;
    }

    InputFormat input_format(std::size_t) const override { return format_; }
    std::size_t tile() const override { return 4 * kTileRows; } // that many share a broadcast of their inputs

    std::size_t bytes() const override {
        const std::size_t tiles = (out_features + kTileRows - 1) / kTileRows, groups = weight_.groups;
        std::size_t scales = groups * kTileRows * 4, zeros = groups * kTileRows; // of a tile
        if (weight_.scale_layout == ScaleLayout::channel) scales = kTileRows * 4, zeros = kTileRows;
        if (weight_.scale_layout == ScaleLayout::groups_bfloat16) scales = (groups + 1) / 2 * kTileRows * 4;
        return tiles * (groups * weight_.group * kTileRows * std::size_t(bits_) / 8 + scales + (weight_.zeros == nullptr ? 0 : zeros));
    }

    void multiply(const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) const override {
        multiply_(weight_, x, y, y_stride, begin, end);
    }

  private:
    IntWeight weight_;
    int bits_;
    InputFormat format_;
    IntMultiply multiply_;
};

} // namespace

std::vector<std::string> int_instruction_sets() {
    std::vector<std::string> names;
    for (const IntKernels *kernels : available()) names.emplace_back(kernels->name);
    return names;
}

std::unique_ptr<Linear> make_int_linear(const IntWeight &weight, const IntLinearOptions &options) {
    if (options.bits != 2 && options.bits != 3 && options.bits != 4 && options.bits != 8) {
        throw std::invalid_argument("integer weights have 2, 3, 4 or 8 bits");
    }
    if (weight.group == 0 || weight.group % 32 != 0) throw std::invalid_argument("a group is not a multiple of 32 columns");
    if (weight.groups != (options.in_features + weight.group - 1) / weight.group) {
        throw std::invalid_argument("the groups do not cover in_features");
    }
    return std::make_unique<IntLinear>(weight, options);
}

} // namespace fewbit
