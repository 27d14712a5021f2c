// The largest contributions of neurons to each row of a whole, measured in L1.
#pragma once

#include <cstdint>

#include "core/parts.h"
#include "core/support.h"

namespace lmtt {

// Shapes as in lmtt.kernels.types.NeuronTask (Parts::residual is its base); all arrays dense, float32.
struct NeuronInput {
  int64_t T, F, k;  // k <= F
  const float* act;
  const float* stored;  // W_down as linear layers store it, [D, F]; null where rows are given
  float* rows;          // W_down [F, D]: given, or memory for it where `stored` is given
  const float* row_scale;  // may be null
  Parts parts;
  double screen;
  int64_t workspace;  // bytes
  int threads;
};

// Caller's arrays, overwritten entirely.
struct NeuronOutput {
  int64_t* index;
  float *value, *residual, *bias, *others, *normaliser, *certificate, *checksum;
  int64_t evaluated = 0, positive = 0;
  Stages stages;
};

void neuron_contributions(const NeuronInput& in, NeuronOutput& out);

}  // namespace lmtt
