// A Linear over weights in tables of 16 numbers or in FP8, with inputs in float32.

#pragma once

#include "table_dot.hpp"

#include <memory>
#include <string>

namespace fewbit {

// Bytes of one tile of 64 outputs.
std::size_t table_tile_bytes(const TableWeight &weight);

// Throws std::invalid_argument: groups that do not cover the columns, columns of a table that are no multiple of 8, an instruction set that
// is not among float_instruction_sets() (dense.hpp).
std::unique_ptr<Linear> make_table_linear(const TableWeight &weight, const std::string &instruction_set);

} // namespace fewbit
