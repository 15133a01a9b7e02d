// The extension module: index structures of a mask, and dispatch to the kernels of this machine.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernel.hpp"

namespace nb = nanobind;

namespace tombola {
namespace {

// Fastest first.
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
#if defined(TOMBOLA_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found.push_back(&avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
    found.push_back(&plain);
    return found;
}

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels* k : supported())
        if (name == k->name) return *k;
    throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

float* pointer(uintptr_t address) { return reinterpret_cast<float*>(address); }

// (address, strides of samples, channels, rows, columns); what is left out is 0.
View view(const nb::tuple& t) {
    ptrdiff_t strides[4] = {};
    for (size_t i = 1; i < t.size(); ++i) strides[i - 1] = nb::cast<ptrdiff_t>(t[i]);
    const auto [n, c, h, w] = strides;
    return {pointer(nb::cast<uintptr_t>(t[0])), n, c, h, w, 0, false};
}

// Memory for packed tiles, kept from call to call by each thread.
float* workspace(size_t floats) {
    struct Release {
        void operator()(float* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<float, Release> memory;
    thread_local size_t size = 0;
    if (floats > size) {
        const size_t more = (floats + 1023) / 1024 * 1024;
        size = 0;
        memory.reset(static_cast<float*>(std::aligned_alloc(4096, more * sizeof(float))));
        if (!memory) throw std::bad_alloc();
        size = more;
    }
    return memory.get();
}

// Bytes of a cache for packed activations, and taps that are worth a piece of a row, as measured.
struct Sizes {
    size_t first_cache, least_taps;
};
constexpr Sizes of_pixels{24 << 10, 12}, of_one_pixel{32 << 10, 40};
const size_t second_cache = 256 << 10;

struct Tap {
    int channel, y, x;
};

// A Pass and the arrays it points to.
struct Structure {
    Pass pass{};
    std::vector<int32_t> split, offset;
    size_t source_floats = 0, target_floats = 0;

    // taps[first[r]] to taps[first[r + 1]] are those of row r, by ascending channel; left out where `wanted` says so.
    template <class Wanted>
    void build(const std::vector<Tap>& taps, const std::vector<int32_t>& first, const Wanted& wanted) {
        Pass& p = pass;
        const int columns = (p.grid_width - 1) * p.source_step + p.tap_width;
        const size_t line = sizeof(float) * columns * p.block;
        const auto height = [&](int band) { return (band - 1) * p.source_step + p.tap_height; };
        // The lines that one group of pixels reads should fit the first cache, but a piece of a row costs a load and
        // a store of the accumulators, so it should have some taps; the packed tile should fit the second cache.
        const size_t window = sizeof(float) * p.block * p.tap_height * (p.tap_width + (p.grid_width > 1 ? 3 : 0));
        const Sizes sizes = p.grid_height * p.grid_width == 1 ? of_one_pixel : of_pixels;
        const size_t fitting = sizes.first_cache / window;
        const size_t worth = sizes.least_taps * p.rows * p.channels / (taps.size() + 1);
        size_t channels = std::max({fitting, worth, size_t(1)});
        p.band = p.grid_height;
        while (p.band > 2 && std::min<size_t>(channels, p.channels) * line * height(p.band) > second_cache)
            p.band = (p.band + 1) / 2;
        channels = std::min(channels, std::max<size_t>(1, second_cache / (line * height(p.band))));
        p.tiles = static_cast<int>((p.channels + channels - 1) / channels);
        p.tile_channels = (p.channels + p.tiles - 1) / p.tiles;
        p.tiles = (p.channels + p.tile_channels - 1) / p.tile_channels;

        source_floats = line / sizeof(float) * height(p.band) * p.tile_channels;
        target_floats = size_t(p.rows) * p.band * p.grid_width * p.block;
        offset.resize(taps.size());
        split.reserve(size_t(p.rows) * (p.tiles + 1));
        for (int r = 0; r < p.rows; ++r) {
            if (!wanted(r)) {
                split.insert(split.end(), p.tiles + 1, first[r + 1]);
                continue;
            }
            int32_t k = first[r];
            for (int tile = 0; tile < p.tiles; ++tile) {
                split.push_back(k);
                for (; k < first[r + 1] && taps[k].channel < (tile + 1) * p.tile_channels; ++k) {
                    const Tap& tap = taps[k];
                    const int channel = tap.channel - tile * p.tile_channels;
                    offset[k] = (channel * height(p.band) + tap.y) * columns + tap.x;
                }
            }
            split.push_back(k);
        }
        p.split = split.data();
        p.offset = offset.data();
    }
};

// What the three products of one layer need to know of its mask, for one size of picture. A linear
// layer is a convolution of a picture of one pixel. Values and their gradient are in the order of
// `alive`: the ascending flat indices of the survivors in a weight of shape (outputs, inputs, kernel). What leads to
// outputs that are not `read` is left out of the work: they are their bias, and the gradients of their weights 0.
class Layer {
  public:
    Layer(nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> alive, int outputs, int inputs,
          std::pair<int, int> kernel, std::pair<int, int> picture, int stride, std::pair<int, int> padding,
          const std::string& instruction_set,
          nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu> read)
        : kernels_(kernels_named(instruction_set)) {
        const auto [kernel_height, kernel_width] = kernel;
        const auto [height, width] = picture;
        const int count = static_cast<int>(alive.shape(0)), kernel_size = kernel_height * kernel_width;
        const bool linear = kernel_size == 1 && height * width == 1;
        const int block = linear ? kernels_.linear_block : kernels_.conv_block;

        struct Weight {
            int output, input, y, x;
        };
        std::vector<Weight> weights;
        weights.reserve(count);
        for (int k = 0; k < count; ++k) {
            const int64_t flat = alive.data()[k];
            const int tap = static_cast<int>(flat % kernel_size), channel = static_cast<int>(flat / kernel_size);
            weights.push_back({channel / inputs, channel % inputs, tap / kernel_width, tap % kernel_width});
        }

        std::vector<Tap> taps;
        std::vector<int32_t> first(outputs + 1);
        for (const Weight& w : weights) {
            taps.push_back({w.input, w.y, w.x});
            ++first[w.output + 1];
        }
        for (int r = 0; r < outputs; ++r) first[r + 1] += first[r];
        Pass& f = forward_.pass;
        f.rows = outputs, f.channels = inputs, f.height = height, f.width = width;
        f.pad_top = padding.first, f.pad_left = padding.second;
        f.tap_height = kernel_height, f.tap_width = kernel_width;
        f.grid_height = f.target_height = (height + 2 * padding.first - kernel_height) / stride + 1;
        f.grid_width = f.target_width = (width + 2 * padding.second - kernel_width) / stride + 1;
        f.source_step = stride, f.target_step = 1, f.block = block;
        forward_.build(taps, first, [&](int r) { return read.data()[r]; });

        // Input pixel (stride * i + a, stride * j + b) is reached by the taps of one phase of the kernel only,
        // and each of these from the output pixel (i, j) plus a constant shift.
        order_.reserve(count);
        for (int a = 0; a < std::min(stride, height); ++a)
            for (int b = 0; b < std::min(stride, width); ++b) {
                Structure& structure = backward_.emplace_back();
                Pass& p = structure.pass;
                p.rows = inputs, p.channels = outputs, p.height = f.grid_height, p.width = f.grid_width;
                p.grid_height = (height - a + stride - 1) / stride, p.grid_width = (width - b + stride - 1) / stride;
                p.source_step = 1, p.target_step = stride, p.target_top = a, p.target_left = b;
                p.target_height = height, p.target_width = width, p.block = block;
                std::tie(p.pad_top, p.tap_height) = shifts(a + padding.first, kernel_height, stride);
                std::tie(p.pad_left, p.tap_width) = shifts(b + padding.second, kernel_width, stride);

                std::vector<int32_t> start(inputs + 1);
                const auto in_phase = [&](const Weight& w) {
                    return read.data()[w.output] && (a + padding.first - w.y) % stride == 0 &&
                           (b + padding.second - w.x) % stride == 0;
                };
                for (const Weight& w : weights)
                    if (in_phase(w)) ++start[w.input + 1];
                for (int r = 0; r < inputs; ++r) start[r + 1] += start[r];
                const size_t done = order_.size();
                std::vector<Tap> transposed(start.back());
                order_.resize(done + start.back());
                std::vector<int32_t> next(start);
                for (int k = 0; k < count; ++k) {
                    const Weight& w = weights[k];
                    if (!in_phase(w)) continue;
                    const int at = next[w.input]++;
                    order_[done + at] = k;
                    transposed[at] = {w.output, (a + padding.first - w.y) / stride + p.pad_top,
                                      (b + padding.second - w.x) / stride + p.pad_left};
                }
                structure.build(transposed, start, [](int) { return true; });
            }
    }

    int block() const { return forward_.pass.block; }
    int outputs() const { return forward_.pass.rows; }
    int inputs() const { return forward_.pass.channels; }
    const Kernels& kernels() const { return kernels_; }

    void forward(uintptr_t values, uintptr_t bias, nb::tuple source, int batch, uintptr_t target) const {
        const View x = view(source);
        nb::gil_scoped_release unlocked;
        kernels_.gather(forward_.pass, pointer(values), pointer(bias), x, batch,
                        side_by_side(forward_.pass, batch, pointer(target)), workspace(forward_.source_floats));
    }

    void input_gradient(uintptr_t values, nb::tuple delta, int batch, uintptr_t target) const {
        const View d = view(delta);
        nb::gil_scoped_release unlocked;
        input_gradient(pointer(values), d, batch, side_by_side(backward_[0].pass, batch, pointer(target)),
                       workspace(count_in_lines() + backward_floats()));
    }

    void weight_gradient(nb::tuple source, nb::tuple delta, int batch, uintptr_t gradient,
                         uintptr_t bias_gradient) const {
        const View x = view(source), d = view(delta);
        nb::gil_scoped_release unlocked;
        kernels_.correlate(forward_.pass, x, d, batch, pointer(gradient), pointer(bias_gradient),
                           workspace(forward_.source_floats + forward_.target_floats));
    }

    // The same for a linear layer whose source and target are packed: (blocks, features, block). `memory` holds the
    // values in the order of the transposed weight.
    void forward_packed(const float* values, const float* bias, float* source, int batch, float* target) const {
        kernels_.gather(forward_.pass, values, bias, packed(source, inputs()), batch, packed_target(target, outputs()),
                        nullptr);
    }

    void input_gradient_packed(const float* values, float* delta, int batch, float* target, float* memory) const {
        input_gradient(values, packed(delta, outputs()), batch, packed_target(target, inputs()), memory);
    }

    void weight_gradient_packed(float* source, float* delta, int batch, float* gradient, float* bias_gradient) const {
        kernels_.correlate(forward_.pass, packed(source, inputs()), packed(delta, outputs()), batch, gradient,
                           bias_gradient, nullptr);
    }

    size_t count() const { return order_.size(); }

  private:
    View view(const nb::tuple& t) const {
        View v = tombola::view(t);
        v.blocks = v.n * block();
        return v;
    }

    // Over the taps y of one phase, with shift (at - y) / stride: minus the least shift, and the extent of the shifts.
    static std::pair<int, int> shifts(int at, int size, int stride) {
        int least = 0, most = 0;
        bool any = false;
        for (int y = 0; y < size; ++y)
            if ((at - y) % stride == 0) {
                const int shift = (at - y) / stride;
                least = any ? std::min(least, shift) : shift;
                most = any ? std::max(most, shift) : shift;
                any = true;
            }
        return {-least, most - least + 1};
    }

    void input_gradient(const float* values, View delta, int batch, Target target, float* memory) const {
        for (size_t k = 0; k < order_.size(); ++k) memory[k] = values[order_[k]];
        const float* ordered = memory;
        float* packed = memory + count_in_lines();
        for (const Structure& structure : backward_) {
            kernels_.gather(structure.pass, ordered, nullptr, delta, batch, target, packed);
            ordered += structure.offset.size();
        }
    }

    size_t count_in_lines() const { return (order_.size() + 15) / 16 * 16; }

    size_t backward_floats() const {
        size_t most = 0;
        for (const Structure& structure : backward_) most = std::max(most, structure.source_floats);
        return most;
    }

    // (rows, height, width, batch), contiguous.
    static Target side_by_side(const Pass& pass, int batch, float* data) {
        return {data, ptrdiff_t(pass.target_height) * pass.target_width * batch, batch, pass.block};
    }

    View packed(float* data, int features) const {
        return {data, 1, block(), 0, 0, ptrdiff_t(features) * block(), true};
    }

    Target packed_target(float* data, int features) const { return {data, block(), 0, ptrdiff_t(features) * block()}; }

    const Kernels& kernels_;
    Structure forward_;
    std::deque<Structure> backward_;   // by phase
    std::vector<int32_t> order_;       // of the values in the passes of backward_
};

// Linear layers, each the source of the next, some with a ReLU. What they compute stays packed from layer to layer:
// `memory` of a forward pass holds source and outputs, one after the other, for the backward pass.
class Chain {
  public:
    Chain(std::vector<const Layer*> layers, std::vector<bool> relus) : layers_(layers), relus_(relus) {
        if (layers.empty() || layers.size() != relus.size())
            throw std::invalid_argument("expected a ReLU or none a layer");
        for (size_t i = 0; i < layers.size(); ++i)
            if (!layers[i] || &layers[i]->kernels() != &layers[0]->kernels() ||
                layers[i]->block() != layers[i]->kernels().linear_block ||
                (i > 0 && layers[i]->inputs() != layers[i - 1]->outputs()))
                throw std::invalid_argument("expected linear layers that fit together, of one instruction set");
    }

    int inputs() const { return layers_[0]->inputs(); }
    int outputs() const { return layers_.back()->outputs(); }

    // Of the memory that a batch takes.
    size_t floats(int batch) const {
        size_t features = layers_[0]->inputs();
        for (const Layer* layer : layers_) features += layer->outputs();
        return features * blocks(batch) * block();
    }

    // `parameters` are the addresses of the values and the bias (or 0) of each layer in turn.
    void forward(const std::vector<uintptr_t>& parameters, nb::tuple source, int batch, nb::tuple target,
                 uintptr_t memory) const {
        const View from = view(source), to = view(target);
        nb::gil_scoped_release unlocked;
        const size_t width = blocks(batch) * block();
        const int rounded = whole(batch);
        float* x = pointer(memory);
        kernels().pack_features(from, layers_[0]->inputs(), batch, x);
        for (size_t i = 0; i < layers_.size(); ++i) {
            const int outputs = layers_[i]->outputs();
            float* y = x + layers_[i]->inputs() * width;
            layers_[i]->forward_packed(pointer(parameters[2 * i]), pointer(parameters[2 * i + 1]), x, rounded, y);
            if (relus_[i]) kernels().rectify(y, outputs * width);
            for (int f = 0; f < outputs; ++f)  // a bias makes something of no sample too
                for (int n = batch; n < rounded; ++n)
                    y[((blocks(batch) - 1) * outputs + f) * block() + n % block()] = 0;
            x = y;
        }
        kernels().unpack_features(x, layers_.back()->outputs(), batch, to);
    }

    // Of the scratch memory of a backward pass: two gradients of activations, and a layer's values in another order.
    size_t scratch_floats(int batch) const {
        size_t values = 0;
        for (const Layer* layer : layers_) values = std::max(values, layer->count());
        return 2 * delta_floats(batch) + values;
    }

    // `gradients` are addresses like `parameters`, 0 for what is not wanted; so is the source's `target`.
    void backward(const std::vector<uintptr_t>& parameters, nb::tuple delta, int batch, uintptr_t memory,
                  uintptr_t scratch, const std::vector<uintptr_t>& gradients, nb::tuple target) const {
        const View from = view(delta), to = view(target);
        nb::gil_scoped_release unlocked;
        const size_t width = blocks(batch) * block();
        const int rounded = whole(batch);
        float *dy = pointer(scratch), *dx = dy + delta_floats(batch), *ordered = dx + delta_floats(batch);
        float* y = pointer(memory) + floats(batch) - layers_.back()->outputs() * width;
        kernels().pack_features(from, layers_.back()->outputs(), batch, dy);
        for (size_t i = layers_.size(); i-- > 0;) {
            const Layer& layer = *layers_[i];
            float* x = y - layer.inputs() * width;
            if (relus_[i]) kernels().gate(dy, y, layer.outputs() * width);
            if (gradients[2 * i] || gradients[2 * i + 1])
                layer.weight_gradient_packed(x, dy, rounded, pointer(gradients[2 * i]), pointer(gradients[2 * i + 1]));
            if (i > 0 || to.data) layer.input_gradient_packed(pointer(parameters[2 * i]), dy, rounded, dx, ordered);
            std::swap(dy, dx);
            y = x;
        }
        if (to.data) kernels().unpack_features(dy, layers_[0]->inputs(), batch, to);
    }

  private:
    const Kernels& kernels() const { return layers_[0]->kernels(); }
    size_t block() const { return layers_[0]->block(); }
    size_t blocks(int batch) const { return (batch + block() - 1) / block(); }

    // Of the gradient of the widest activations.
    size_t delta_floats(int batch) const {
        int features = inputs();
        for (const Layer* layer : layers_) features = std::max(features, layer->outputs());
        return features * blocks(batch) * block();
    }

    // The batch with as many samples in its last block as the kernels compute at once.
    int whole(int batch) const {
        const int size = static_cast<int>(block()), rest = batch % size;
        int samples = size;
        while (rest && samples / 2 >= rest && samples / 2 >= size / linear_vectors) samples /= 2;
        return rest ? batch - rest + samples : batch;
    }

    std::vector<const Layer*> layers_;
    std::vector<bool> relus_;
};

// Batch normalisation of `count` samples and pixels per channel, side by side; all arguments but the sizes are
// addresses. The statistics are (3, channels): mean, biased variance, 1 / sqrt(variance + epsilon).
void normalize(uintptr_t x, int channels, ptrdiff_t count, uintptr_t weight, uintptr_t bias, float epsilon,
               uintptr_t statistics, uintptr_t y) {
    nb::gil_scoped_release unlocked;
    float* mean = pointer(statistics);
    supported()[0]->normalize(pointer(x), channels, count, pointer(weight), pointer(bias), epsilon, mean,
                              mean + channels, mean + 2 * channels, pointer(y));
}

void normalize_gradient(uintptr_t x, uintptr_t delta, int channels, ptrdiff_t count, uintptr_t weight,
                        uintptr_t statistics, uintptr_t gradient, uintptr_t weight_gradient, uintptr_t bias_gradient) {
    nb::gil_scoped_release unlocked;
    const float* mean = pointer(statistics);
    supported()[0]->normalize_gradient(pointer(x), pointer(delta), channels, count, pointer(weight), mean,
                                       mean + 2 * channels, pointer(gradient), pointer(weight_gradient),
                                       pointer(bias_gradient));
}

// The chosen images, (pixel - mean) * scale for each channel; all arguments but the sizes are addresses.
void normalized_images(uintptr_t images, uintptr_t chosen, ptrdiff_t count, int channels, ptrdiff_t pixels,
                       uintptr_t mean, uintptr_t scale, uintptr_t target) {
    nb::gil_scoped_release unlocked;
    supported()[0]->normalize_images(reinterpret_cast<const uint8_t*>(images),
                                     reinterpret_cast<const int64_t*>(chosen), count, channels, pixels, pointer(mean),
                                     pointer(scale), pointer(target));
}

NB_MODULE(_sparse, m) {
    nb::set_leak_warnings(false);  // layers that live until the interpreter ends are no leak
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* k : supported()) names.push_back(k->name);
        return names;
    });
    nb::class_<Layer>(m, "Layer")
        .def(nb::init<nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>, int, int,
                      std::pair<int, int>, std::pair<int, int>, int, std::pair<int, int>, const std::string&,
                      nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(),
             nb::arg("alive"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("kernel"), nb::arg("picture"),
             nb::arg("stride"), nb::arg("padding"), nb::arg("instruction_set"), nb::arg("read"))
        .def("forward", &Layer::forward)
        .def("input_gradient",
             nb::overload_cast<uintptr_t, nb::tuple, int, uintptr_t>(&Layer::input_gradient, nb::const_))
        .def("weight_gradient", &Layer::weight_gradient);
    nb::class_<Chain>(m, "Chain")
        .def(nb::init<std::vector<const Layer*>, std::vector<bool>>(), nb::keep_alive<1, 2>())  // a tuple of layers
        .def_prop_ro("inputs", &Chain::inputs)
        .def_prop_ro("outputs", &Chain::outputs)
        .def("floats", &Chain::floats)
        .def("scratch_floats", &Chain::scratch_floats)
        .def("forward", &Chain::forward)
        .def("backward", &Chain::backward);
    m.def("normalize", normalize);
    m.def("normalize_gradient", normalize_gradient);
    m.def("normalized_images", normalized_images);
}

}  // namespace
}  // namespace tombola
