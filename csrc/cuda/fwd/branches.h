// From a call of the attention forward to one launch for each branch.
#pragma once

#include <functional>

#include "cuda/fwd/params.h"

namespace nsa::cuda {

/// Calls launch(params) for each enabled branch, with all that does not depend on tile shapes.
void for_each_branch(const AttnFwd& call, void* workspace,
                     const std::function<void(const FwdParams&)>& launch);

/// The workspace that for_each_branch needs.
int64_t branch_workspace(const AttnFwd& call);

}  // namespace nsa::cuda
