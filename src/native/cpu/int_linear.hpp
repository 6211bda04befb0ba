// A Linear over integer weights that computes with INT8 activations.

#pragma once

#include "int_dot.hpp"

#include <memory>
#include <string>
#include <vector>

namespace fewbit {

// The instruction sets for integer products that this CPU has, the best first; "portable" is always the last.
std::vector<std::string> int_instruction_sets();

struct IntLinearOptions {
    int bits = 4;               // 2, 3, 4 or 8
    std::size_t in_features = 0;
    float range = 127.0f;       // of the input's format
    float static_scale = 0.0f;
    std::string instruction_set; // empty: the best
};

// Throws std::invalid_argument: bits, a group that does not cover in_features, an instruction set that this CPU lacks.
std::unique_ptr<Linear> make_int_linear(const IntWeight &weight, const IntLinearOptions &options);

} // namespace fewbit
