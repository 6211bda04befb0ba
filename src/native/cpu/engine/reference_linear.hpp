// A float32 weight, multiplied the plain way: what the engine is tested with.
#pragma once

#include "../linear.hpp"

#include <memory>

namespace fewbit::engine {

// `weight` [out, in] belongs to the caller.
std::unique_ptr<Linear> make_reference_linear(const float *weight, std::size_t out, std::size_t in);

}  // namespace fewbit::engine
