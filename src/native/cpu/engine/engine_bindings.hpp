#pragma once

#include <nanobind/nanobind.h>

namespace fewbit::engine {

// The decode engine and its KV cache in Python.
void bind_engine(nanobind::module_ &m);

}  // namespace fewbit::engine
