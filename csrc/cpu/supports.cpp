#include <string>
#include <vector>

#include "nsa/api.h"
#include "nsa/geometry.h"

namespace nsa::cpu {

std::vector<std::string> supports(const AttnShape& shape, const BlockConfig& config) {
  std::vector<std::string> reasons;
  if (const char* error = config_error(config)) reasons.push_back(error);
  if (shape.heads_kv < 1 || shape.heads_q < 1 || shape.heads_q % shape.heads_kv) {
    reasons.push_back(
        "the number of query heads must be a multiple of the number of key-value heads");
  }
  if (shape.dim_qk < 1 || shape.dim_v < 1) reasons.push_back("head dims must be at least 1");
  return reasons;
}

}  // namespace nsa::cpu
