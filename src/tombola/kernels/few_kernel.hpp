// The forward pass of a sparse layer for few samples, compiled with kernel.cpp once per instruction set.
//
// The lanes of a vector are neighbouring pixels, of all samples, so that one sample fills them too. A surviving weight
// multiplies a run of the packed source that lies as far from the run of the target for all pixels (see few.hpp).
#pragma once

namespace tombola {
namespace {

// P vectors of every row, from `source` on. A row has so many sums of their own that the multiply-adds need not wait
// for each other.
template <int P>
void few_vectors(const Few& few, const float* values, const float* bias, const float* source, float* target) {
    constexpr int chains = P == 1 ? 8 : P == 2 ? 4 : P == 3 ? 3 : P < 7 ? 2 : 1;
    for (int r = 0; r < few.rows; ++r, target += P * L) {
        vec sum[chains][P];
        for (int c = 0; c < chains; ++c)
            for (int p = 0; p < P; ++p) sum[c][p] = (bias && !c ? bias[r] : 0.f) - vec{};
        const int end = few.first[r + 1];
        int k = few.first[r];
        for (; k + chains <= end; k += chains)
            for (int c = 0; c < chains; ++c) {
                const float value = values[k + c];
                const float* const from = source + few.offset[k + c];
                for (int p = 0; p < P; ++p) sum[c][p] += value * load(from + p * L);
            }
        for (; k < end; ++k) {
            const float value = values[k];
            const float* const from = source + few.offset[k];
            for (int p = 0; p < P; ++p) sum[0][p] += value * load(from + p * L);
        }
        for (int c = 1; c < chains; ++c)
            for (int p = 0; p < P; ++p) sum[0][p] += sum[c][p];
        for (int p = 0; p < P; ++p) store(target + p * L, sum[0][p]);
    }
}

template <int P = few_vectors_most>
void few_tile(const Few& few, int vectors, const float* values, const float* bias, const float* source,
              float* target) {
    if (vectors == P)
        few_vectors<P>(few, values, bias, source, target);
    else if constexpr (P > 1)
        few_tile<P - 1>(few, vectors, values, bias, source, target);
}

void gather_few(const Few& few, int vectors, const float* values, const float* bias, const float* source,
                float* target) {
    few_tile(few, vectors, values, bias, source, target);
}

// The same for one sample of one pixel, without the lanes.
void gather_one(const Few& few, const float* values, const float* bias, const float* source, float* target,
                ptrdiff_t step) {
    for (int r = 0; r < few.rows; ++r) {
        float a = bias ? bias[r] : 0.f, b = 0, c = 0, d = 0;
        const int end = few.first[r + 1];
        int k = few.first[r];
        for (; k + 4 <= end; k += 4) {
            a += values[k] * source[few.offset[k]];
            b += values[k + 1] * source[few.offset[k + 1]];
            c += values[k + 2] * source[few.offset[k + 2]];
            d += values[k + 3] * source[few.offset[k + 3]];
            asm("");  // or the compiler builds vectors of the four, which takes three times as long
        }
        for (; k < end; ++k) a += values[k] * source[few.offset[k]];
        target[r * step] = (a + b) + (c + d);
    }
}

// Samples of one pixel side by side: to[m * block + s] = from[s * sample + m * feature], zero beyond the last sample.
void pack_few(const float* from, ptrdiff_t sample, ptrdiff_t feature, int samples, int block, int features, float* to) {
    if (feature == 1) return pack_transposed(from, sample, samples, block, features, to, block);
    for (int m = 0; m < features; ++m)
        for (int s = 0; s < block; ++s) to[m * block + s] = s < samples ? from[s * sample + m * feature] : 0.f;
}

}  // namespace
}  // namespace tombola
