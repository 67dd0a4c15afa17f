// The kernel of linear_one.cu.
#pragma once
#include "linear.cuh"

namespace hfl {

// For a row of so many columns, of a kind of hfl_quantize; NULL where there is none.
const void* linear_one(Form form, int columns, int kind);

}  // namespace hfl
