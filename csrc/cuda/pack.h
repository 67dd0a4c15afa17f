// Tokens into slots of few bits, where nothing else is kept of them: what ops.fill_pages and ops.append_pages launch.
#pragma once
#include <cuda_runtime.h>

#include "../fill.h"

namespace hfl {

// Whether `launch_pack` stores the tokens of a call that has been checked.
bool packs(const hfl_append& a);

// Stores the tokens of `fill.at`, and gives what is read of them; sets no other slots. early: a step may follow that is
// set up while this runs, as it reads nothing that is written here before it has waited.
cudaError_t launch_pack(const hfl_fill& fill, void* stream, bool early);

}  // namespace hfl
