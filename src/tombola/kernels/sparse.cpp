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

// Memory for packed tiles, kept from call to call by each thread.
float* workspace(size_t floats) {
    struct Release {
        void operator()(float* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<float, Release> memory;
    thread_local size_t size = 0;
    if (floats > size) {
        size = (floats + 1023) / 1024 * 1024;
        memory.reset(static_cast<float*>(std::aligned_alloc(4096, size * sizeof(float))));
        if (!memory) throw std::bad_alloc();
    }
    return memory.get();
}

// Bytes of each cache for packed activations, and taps that are worth a piece of a row.
const size_t first_cache = 24 << 10, second_cache = 256 << 10, least_taps = 12;

struct Tap {
    int channel, y, x;
};

// A Pass and the arrays it points to.
struct Structure {
    Pass pass{};
    std::vector<int32_t> split, offset;
    size_t source_floats = 0, target_floats = 0;

    // taps[first[r]] to taps[first[r + 1]] are those of row r, by ascending channel.
    void build(const std::vector<Tap>& taps, const std::vector<int32_t>& first) {
        Pass& p = pass;
        const int columns = (p.grid_width - 1) * p.source_step + p.tap_width;
        const size_t line = sizeof(float) * columns * p.block;
        const auto height = [&](int band) { return (band - 1) * p.source_step + p.tap_height; };
        // The lines that one group of pixels reads should fit the first cache, but a piece of a row costs a load and
        // a store of the accumulators, so it should have some taps; the packed tile should fit the second cache.
        const size_t window = sizeof(float) * p.block * p.tap_height * (p.tap_width + (p.grid_width > 1 ? 3 : 0));
        const size_t fitting = first_cache / window, worth = least_taps * p.rows * p.channels / (taps.size() + 1);
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
// `alive`: the ascending flat indices of the survivors in a weight of shape (outputs, inputs, kernel).
class Layer {
  public:
    Layer(nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> alive, int outputs, int inputs,
          std::pair<int, int> kernel, std::pair<int, int> picture, int stride, std::pair<int, int> padding,
          const std::string& instruction_set)
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
        forward_.build(taps, first);

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
                    return (a + padding.first - w.y) % stride == 0 && (b + padding.second - w.x) % stride == 0;
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
                structure.build(transposed, start);
            }
    }

    int block() const { return forward_.pass.block; }

    // With `keep`, packs the source of a linear layer there: (blocks of the batch, features, block).
    void forward(uintptr_t values, uintptr_t bias, nb::tuple source, int batch, uintptr_t target,
                 uintptr_t keep) const {
        const View x = view(source);
        nb::gil_scoped_release unlocked;
        kernels_.gather(forward_.pass, pointer(values), pointer(bias), x, batch, pointer(target),
                        keep ? pointer(keep) : workspace(forward_.source_floats), keep);
    }

    void input_gradient(uintptr_t values, nb::tuple delta, int batch, uintptr_t target) const {
        const View d = view(delta);
        nb::gil_scoped_release unlocked;
        const float* from = pointer(values);
        float* memory = workspace(order_.size() + backward_floats());
        for (size_t k = 0; k < order_.size(); ++k) memory[k] = from[order_[k]];
        const float* ordered = memory;
        float* packed = memory + (order_.size() + 15) / 16 * 16;
        for (const Structure& structure : backward_) {
            kernels_.gather(structure.pass, ordered, nullptr, d, batch, pointer(target), packed, false);
            ordered += structure.offset.size();
        }
    }

    void weight_gradient(nb::tuple source, nb::tuple delta, int batch, uintptr_t gradient,
                         uintptr_t bias_gradient) const {
        const View x = view(source), d = view(delta);
        nb::gil_scoped_release unlocked;
        kernels_.correlate(forward_.pass, x, d, batch, pointer(gradient), pointer(bias_gradient),
                           workspace(forward_.source_floats + forward_.target_floats));
    }

  private:
    // (address, strides of samples, channels, rows, columns, blocks of samples); what is left out is 0 or follows.
    View view(const nb::tuple& t) const {
        ptrdiff_t strides[5] = {};
        for (size_t i = 1; i < t.size(); ++i) strides[i - 1] = nb::cast<ptrdiff_t>(t[i]);
        const auto [n, c, h, w, blocks] = strides;
        return {pointer(nb::cast<uintptr_t>(t[0])), n, c, h, w, t.size() > 5 ? blocks : n * block()};
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

    size_t backward_floats() const {
        size_t most = 0;
        for (const Structure& structure : backward_) most = std::max(most, structure.source_floats);
        return most + 16;
    }

    const Kernels& kernels_;
    Structure forward_;
    std::deque<Structure> backward_;   // by phase
    std::vector<int32_t> order_;       // of the values in the passes of backward_
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
                      std::pair<int, int>, std::pair<int, int>, int, std::pair<int, int>, const std::string&>(),
             nb::arg("alive"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("kernel"), nb::arg("picture"),
             nb::arg("stride"), nb::arg("padding"), nb::arg("instruction_set"))
        .def_prop_ro("block", &Layer::block)
        .def("forward", &Layer::forward)
        .def("input_gradient", &Layer::input_gradient)
        .def("weight_gradient", &Layer::weight_gradient);
    m.def("normalize", normalize);
    m.def("normalize_gradient", normalize_gradient);
    m.def("normalized_images", normalized_images);
}

}  // namespace
}  // namespace tombola
