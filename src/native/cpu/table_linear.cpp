#include "table_linear.hpp"

#include "dense.hpp"

#include <array>
#include <algorithm>
#include <stdexcept>

namespace fewbit {
namespace {

TableMultiply choose(const std::string &wanted) {
    for (const std::string &name : float_instruction_sets()) {
        if (!wanted.empty() && wanted != name) continue;
#if defined(FEWBIT_X86)
        if (name == "avx512") return avx512::kTableMultiply;
        if (name == "avx2") return avx2::kTableMultiply;
#elif defined(FEWBIT_ARM)
        if (name == "neon") return neon::kTableMultiply;
#endif
        return portable::kTableMultiply;
    }
    throw std::invalid_argument("this CPU has no " + wanted);
}

class TableLinear final : public Linear {
  public:
    TableLinear(const TableWeight &weight, TableMultiply multiply) : Linear(weight.out, weight.in), weight_(weight), multiply_(multiply) {
        if (weight.table != nullptr) std::copy_n(weight.table, table_.size(), table_.begin());
        weight_.table = table_.data();
    }

    InputFormat input_format(std::size_t) const override { return {}; }
    std::size_t tile() const override { return kTableTile; }
    std::size_t bytes() const override { return (out_features + kTableTile - 1) / kTableTile * table_tile_bytes(weight_); }

    void multiply(const Input &x, float *y, std::size_t y_stride, std::size_t begin, std::size_t end) const override {
        multiply_(weight_, x, y, y_stride, begin / kTableTile, (end + kTableTile - 1) / kTableTile);
    }

  private:
    TableWeight weight_;
    TableMultiply multiply_;
    std::array<float, 16> table_{};
};

} // namespace

std::size_t table_tile_bytes(const TableWeight &weight) {
    const std::size_t scale_bytes = weight.bfloat16_scales ? 2 : 4, bits = weight.format == TableFormat::table16 ? 4 : 8;
    return weight.groups * kTableTile * (scale_bytes + weight.group * bits / 8);
}

std::unique_ptr<Linear> make_table_linear(const TableWeight &weight, const std::string &instruction_set) {
    if (weight.group == 0 || weight.groups != (weight.in + weight.group - 1) / weight.group) {
        throw std::invalid_argument("the groups do not cover in_features");
    }
    if (weight.format == TableFormat::table16 && (weight.in % 8 != 0 || weight.group % 8 != 0 || weight.table == nullptr)) {
        throw std::invalid_argument("codes of 4 bits need a table, and columns and groups that 8 divides");
    }
    return std::make_unique<TableLinear>(weight, choose(instruction_set));
}

} // namespace fewbit
