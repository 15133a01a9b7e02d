// The interface between the extension module (sparse.cpp) and the kernels (kernel.cpp), which are
// compiled once per instruction set. Plain data only: a standard-library template instantiated in
// both would be one symbol to the linker, and code for a wide instruction set could reach a machine
// that lacks it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tombola {

constexpr int linear_vectors = 8;  // of samples in a block of a linear layer, or 4, 2, 1 in the last

// A float tensor of shape (batch, channels, height, width) in any layout; strides in elements.
// `blocks` is the distance between blocks of samples. A packed one holds whole blocks, zero beyond the last sample.
struct View {
    float* data;
    ptrdiff_t n, c, h, w, blocks;
    bool packed;
};

// One pass over a grid of target pixels. Target pixel (i, j) of row r is
//     sum over the taps k of r of  values[k] * source(channel_k, i * source_step + y_k, j * source_step + x_k)
// where source is zero-padded. Source channels are cut into tiles and grid rows into bands, so that
// the packed piece of source that is read at random stays in the cache; the taps of row r within
// tile t are split[r * (tiles + 1) + t] to split[r * (tiles + 1) + t + 1].
struct Pass {
    int rows;                                // target channels
    int channels, height, width;             // source
    int pad_top, pad_left;                   // zeros before the source's first row and column
    int tap_height, tap_width;               // extent of the taps
    int grid_height, grid_width;             // target pixels of this pass
    int source_step;                         // source pixels between neighbours of the grid
    int target_step, target_top, target_left;// where the grid lies in the target
    int target_height, target_width;
    int block;                               // samples that are packed side by side
    int band;                                // grid rows per packed tile
    int strip;                               // columns of the grid that packed images are computed side by side
    int tiles, tile_channels;
    const int32_t* split;
    // Of each tap in the packed tile, in lines of one block: tile by tile, in each row by row, those of tile t from
    // offset[first_offset[t]] on.
    const int32_t *offset, *first_offset;
    // Of packed images: the channels of each tile that taps read, those of tile t from tapped[tapped_split[t]] on.
    const int32_t *tapped, *tapped_split;
};

// Where the pixels of a pass go: distances between rows, between pixels of a row, between blocks of samples.
struct Target {
    float* data;
    ptrdiff_t row, pixel, blocks;
};

// Packed images, (blocks of samples, channels, pixels, samples of a block): the first block's and channel's pixel (0, 0),
// and distances between blocks, channels and rows of pixels. Pixels of a row are a block apart. Around an image lie as
// many zeros as its readers need, and what is beyond the last sample is zero.
struct Packed {
    float* data;
    ptrdiff_t blocks, channel, row;
};

struct ImageSize {
    int batch, channels, height, width;
};

// A window of max-pooling.
struct Window {
    int height, width, step_down, step_right, pad_top, pad_left;
    int target_height, target_width;
};

// The taps of a layer for few samples, those of row r from first[r] to first[r + 1], each as far as `offset` from the
// target in the packed source.
struct Few {
    int rows;
    const int32_t *first, *offset;
};

constexpr int few_vectors_most = 12;  // of a tile: with the value, as many as there are registers

struct Kernels {
    const char* name;
    int linear_block, conv_block;
    // target = bias + taps * source.
    void (*gather)(const Pass&, const float* values, const float* bias, View source, int batch, Target target,
                   float* workspace);
    // gradient[k] = sum of source * delta under tap k; bias_gradient[r] = sum of delta (or null).
    void (*correlate)(const Pass&, View source, View delta, int batch, float* gradient,
                      float* bias_gradient, float* workspace);
    // (batch, features) in any layout to (blocks, features, block), zero beyond the last sample; and back.
    void (*pack_features)(View from, int features, int batch, float* to);
    void (*unpack_features)(const float* from, int features, int batch, View to);
    void (*rectify)(float* x, ptrdiff_t count);                     // negative numbers become 0
    void (*gate)(float* delta, const float* y, ptrdiff_t count);    // 0 where y is not above 0
    // Batch normalisation of (channels, count): y = (x - mean) * scale * weight + bias with
    // scale = 1 / sqrt(variance + epsilon); all three statistics are written.
    void (*batch_norm)(const float* x, int channels, ptrdiff_t count, const float* weight, const float* bias,
                      float epsilon, float* mean, float* variance, float* scale, float* y);
    void (*batch_norm_gradient)(const float* x, const float* delta, int channels, ptrdiff_t count,
                               const float* weight, const float* mean, const float* scale, float* gradient,
                               float* weight_gradient, float* bias_gradient);
    // target[n] = (images[indices[n]] - mean) * scale, images of (channels, pixels).
    void (*normalise_images)(const uint8_t* images, const int64_t* indices, ptrdiff_t count, int channels,
                             ptrdiff_t pixels, const float* mean, const float* scale, float* target);
    // The same, packed as features: (blocks, channels * pixels, block), zero beyond the last sample.
    void (*pack_normalised_images)(const uint8_t* images, const int64_t* indices, int count, int channels,
                                   ptrdiff_t pixels, const float* mean, const float* scale, float* target);

    // The products for packed images. `offset` is that of each tap from the pixel of its pass, in floats; `add` adds to the
    // target, without a bias. Rows of the target that are not `written` are left as they are; null for all.
    void (*pack_images)(View from, ImageSize size, int border, Packed to);
    void (*unpack_images)(Packed from, ImageSize size, View to);
    void (*gather_packed)(const Pass&, const int32_t* offset, const float* values, const float* bias, Packed source,
                          int batch, Packed target, bool add, const uint8_t* written);
    // gradient[k] += sum of (source under tap k) * delta.
    void (*correlate_packed)(const Pass&, const int32_t* offset, Packed source, Packed delta, int batch, float* gradient);
    // Both at once: gather_packed, and gradient[k] += sum of (source under tap k) * in, where `in` has the target's size.
    void (*gather_and_correlate_packed)(const Pass&, const int32_t* offset, const float* values, Packed source, int batch,
                                        Packed target, bool add, const uint8_t* written, Packed in, float* gradient);
    // The sum of each channel.
    void (*sum_channels)(Packed x, ImageSize size, float* sums);
    // y = normalised x + other, or of these the positive numbers; `other` may be null. Channels that are not `connected`
    // are zero, but not read; of those that are not `read`, without `other`, y is not written, and their gradient is zero,
    // but not read. Gradients of channels that are not `connected` are not written. Both are null for all.
    void (*normalise_packed)(Packed x, ImageSize size, const float* weight, const float* bias, float epsilon, float* mean,
                             float* variance, float* scale, const Packed* other, bool relu, Packed y,
                             const uint8_t* connected, const uint8_t* read);
    // Where `relu`, delta is 0 where y is not above 0: it is overwritten if `y` is given, which must be so with `other`.
    // The gradient of x may be written over delta.
    void (*normalise_gradient_packed)(Packed x, Packed delta, ImageSize size, const float* weight, const float* bias,
                                      const float* mean, const float* scale, bool relu, const Packed* y,
                                      Packed gradient, float* weight_gradient, float* bias_gradient,
                                      const uint8_t* connected, const uint8_t* read);
    void (*sum_packed)(Packed a, const Packed* b, ImageSize size, bool relu, Packed y);  // y may be a; no b: 0
    void (*gate_packed)(Packed delta, Packed y, ImageSize size);
    void (*max_pool)(Packed x, ImageSize size, Window window, Packed y);
    void (*max_pool_gradient)(Packed x, Packed y, Packed delta, ImageSize size, Window window, Packed gradient);
    void (*average)(Packed x, ImageSize size, Packed y);  // over the pixels of each channel; y has one pixel
    void (*average_gradient)(Packed delta, ImageSize size, Packed gradient);

    int lanes;
    // The next `vectors` of each row of the target for few samples, row by row; `source` is where they read.
    void (*gather_few)(const Few&, int vectors, const float* values, const float* bias, const float* source,
                       float* target);
    void (*gather_one)(const Few&, const float* values, const float* bias, const float* source, float* target,
                       ptrdiff_t step);
    void (*pack_few)(const float* from, ptrdiff_t sample, ptrdiff_t feature, int samples, int block, int features,
                     float* to);
};

extern const Kernels plain, avx2, avx512;
extern const Kernels avx512_in_halves;  // the arithmetic of AVX-512 by AVX2, in the builds of the project's own checks

}  // namespace tombola
