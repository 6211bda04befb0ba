// A Linear over integer weights that computes with inputs as they are.

#pragma once

#include "digit_dot.hpp"

#include <memory>
#include <string>
#include <vector>

namespace fewbit {

// `avx512-vnni`, `avx2`, `neon-dotprod`, `neon`, `portable`: those that this CPU runs, the best first.
std::vector<std::string> digit_instruction_sets();

// Bytes of a header (scales, zero points) and of a block of a tile.
std::size_t digit_header_bytes(ScaleType scale_type, bool affine);
std::size_t digit_block_bytes(DigitFormat format, std::size_t block);

// Fills in header_bytes and block_bytes. Throws std::invalid_argument: a block that is no multiple of 16 columns (INT3: 32) or longer than
// 128, groups that do not cover the columns, an instruction set that this CPU lacks.
std::unique_ptr<Linear> make_digit_linear(DigitWeight weight, const std::string &instruction_set);

} // namespace fewbit
