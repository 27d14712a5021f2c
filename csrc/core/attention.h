// Contributions of every (head, source) pair to each row of a whole, measured in L1.
#pragma once

#include <cstdint>
#include <vector>

#include "core/parts.h"
#include "core/support.h"

namespace lmtt {

// A vector for each head and token, wherever they lie: models hand over views.
struct ByHead {
  const float* data;
  int64_t head_stride, token_stride;  // in floats

  const float* at(int64_t head, int64_t token) const { return data + head * head_stride + token * token_stride; }
};

// Shapes as in lmtt.kernels.types.Attention and AttentionTask; all arrays float32, dense but for q, k and v.
struct AttentionInput {
  int64_t T, H, H_kv, E, E_v;
  ByHead q, k, v;
  const float* w_o;         // [D, H, E_v], as linear layers store it
  float scale;
  float softcap;            // 0: none
  int64_t window;           // T or more: none
  const float* sinks;       // the following may be null
  const float* mask;        // float, with mask_stride floats between heads (0: one for all)
  const uint8_t* allowed;   // bool, likewise; at most one of the two
  int64_t mask_stride;
  const float *alibi, *lse, *row_scale, *gate;
  Parts parts;
  double screen;
  double max_certificate;   // rows that screening leaves less certain are screened again, less or not at all
  bool keep_pairs;
  float keep;
  int64_t workspace;        // bytes
  int threads;
};

struct KeptPair {
  int32_t destination, source, head;
  float share;
};

// An edge with a share above `keep`, and its heads' pairs.
struct KeptEdge {
  int32_t destination, source;
  float share;
  int32_t pairs;  // how many of KeptPair are its own
};

// Caller's arrays, overwritten entirely.
struct AttentionOutput {
  float *edges, *per_head, *residual, *bias, *others, *normaliser, *certificate, *checksum;
  int64_t evaluated = 0, positive = 0, reevaluated = 0;
  std::vector<KeptEdge> kept_edges;  // by destination, then source
  std::vector<KeptPair> kept;        // in the same order, then by head
  Stages stages;
};

void attention_contributions(const AttentionInput& in, AttentionOutput& out);

}  // namespace lmtt
