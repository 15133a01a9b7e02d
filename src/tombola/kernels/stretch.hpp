// Several iterations of a perceptron's training in one call. A part of sparse.cpp, with its checks and its layers.
#pragma once

namespace tombola {
namespace {

// Memory for so many elements, as PyTorch aligns it: the bits of its matrix products may depend on it.
template <class T>
std::shared_ptr<T> aligned(size_t count) {
    const std::shared_ptr<T> memory(allocate<T>(count, 64), [](T* data) { std::free(data); });
    std::memset(memory.get(), 0, count * sizeof(T));
    return memory;
}

// Iterations of stochastic gradient descent on a network of linear layers and ReLUs with cross-entropy. Each iteration is
// a list of calls, made once, over memory that stays where it is: gather a batch, forward, loss, backward, update. What
// they compute is what tombola.kernels.linear and the optimizer compute step by step, by the same functions; only copies
// and the counts of Adam are made here, whose bits leave no choice.
class Stretch {
  public:
    // `inputs` are images, (examples, channels, height, width), of which mean and scale are those of the channels; or
    // floats, (examples, features), whose mean and scale are None. `layers` are those of the network in order: a chain
    // of sparse layers with the values and biases of all, or None for a dense layer with weight and bias; the tensors
    // for their gradients; and for a dense layer, whether a ReLU follows, and whether oneDNN multiplies.
    Stretch(nb::handle inputs, nb::handle mean, nb::handle scale, nb::handle labels, int batch, nb::tuple layers)
        : batch_(batch) {
        if (!pytorch().call) throw std::runtime_error("PyTorch's operators are not loaded");
        if (batch < 1 || batch > INT_MAX / 2)
            throw std::invalid_argument("batch: expected 1 to 2^30 examples, got " + std::to_string(batch));
        if (layers.size() == 0) throw std::invalid_argument("layers: expected one or more");
        labels_ = aligned<int64_t>(batch);
        Features top = mean.is_none() ? floats_of(inputs) : images_of(inputs, mean, scale);
        gather_labels(labels);
        for (size_t i = 0; i < layers.size(); ++i) {
            const nb::tuple layer = nb::cast<nb::tuple>(layers[i]);
            if (layer.size() != 5) throw std::invalid_argument("layers: expected chain, weights, gradients, ReLU, oneDNN");
            const nb::tuple weights = nb::cast<nb::tuple>(layer[1]), gradients = nb::cast<nb::tuple>(layer[2]);
            top = layer[0].is_none()
                      ? dense(top, i == 0, weights, gradients, nb::cast<bool>(layer[3]), nb::cast<bool>(layer[4]))
                      : sparse(top, i == 0, nb::cast<nb::object>(layer[0]), weights, gradients);
        }
        cross_entropy(top);
    }

    // Multiply each of these gradients by its mask after each backward pass.
    void multiply(const nb::tuple& gradients, const nb::tuple& masks) {
        const std::vector<Operand> g = flat("gradients", gradients), m = flat("masks", masks, &gradients);
        update_.push_back([=](double) { call("aten::_foreach_mul_", "List", 0, given(g), given(m)); });
    }

    // Update parameters as torch.optim.SGD does; without momentum, there are no `momenta`.
    void sgd(const nb::tuple& parameters, const nb::tuple& gradients, const nb::tuple& momenta, double weight_decay,
             double momentum, bool nesterov) {
        const std::vector<Operand> p = flat("parameters", parameters), g = flat("gradients", gradients, &parameters);
        const std::vector<Operand> m =
            momentum ? flat("momenta", momenta, &parameters) : std::vector<Operand>();
        update_.push_back([=](double rate) {
            const bool maximize = false, first = false;
            call("aten::_fused_sgd_", "", 0, given(p), given(g), given(m), given(weight_decay), given(momentum),
                 given(rate), given(0.0), given(nesterov), given(maximize), given(first), none, none);
        });
    }

    // Update parameters as torch.optim.Adam does, or as AdamW (`decoupled`). `steps` are counters.
    void adam(const nb::tuple& parameters, const nb::tuple& gradients, const nb::tuple& means, const nb::tuple& squares,
              const nb::tuple& steps, double beta1, double beta2, double weight_decay, double epsilon, bool decoupled) {
        const std::vector<Operand> p = flat("parameters", parameters), g = flat("gradients", gradients, &parameters),
                                   m = flat("means", means, &parameters), v = flat("squares", squares, &parameters);
        if (steps.size() != parameters.size()) throw std::invalid_argument("steps: expected one a parameter");
        std::vector<Operand> counts;
        std::vector<float*> counters;
        for (const nb::handle step : steps) {
            counters.push_back(hold<float>("steps", step, 1));
            counts.push_back(one_float(counters.back()));
        }
        const char* const name = decoupled ? "aten::_fused_adamw_" : "aten::_fused_adam_";
        update_.push_back([=](double rate) {
            const bool amsgrad = false, maximize = false;
            for (float* counter : counters) *counter += 1;  // rounded once, as by aten::_foreach_add_
            call(name, "", 0, given(p), given(g), given(m), given(v), given(std::vector<Operand>()), given(counts),
                 given(rate), given(beta1), given(beta2), given(weight_decay), given(epsilon), given(amsgrad),
                 given(maximize), none, none);
        });
    }

    // Do an iteration with each of the learning rates, on the examples that `order` lists, a batch after the other, and
    // note their losses; return how many there were when the time was over, one at least.
    int run(nb::handle order, const std::vector<double>& rates, nb::handle losses, double seconds) {
        const ptrdiff_t count = static_cast<ptrdiff_t>(rates.size());
        const int64_t* const chosen = Tensor<const int64_t>("order", order).contiguous({count * batch_});
        float* const noted = Tensor<float>("losses", losses).contiguous({count});
        for (ptrdiff_t k = 0; k < count * batch_; ++k)
            if (chosen[k] < 0 || chosen[k] >= examples_)
                throw nb::index_error(("order: expected numbers of " + std::to_string(examples_) +
                                       " examples, from 0, got " + std::to_string(chosen[k]) + " at position " +
                                       std::to_string(k))
                                          .c_str());
        for (const auto& check : checks_) check();
        nb::gil_scoped_release unlocked;
        const auto start = std::chrono::steady_clock::now();
        for (ptrdiff_t i = 0; i < count; ++i) {
            chosen_ = chosen + i * batch_;
            for (const auto& each : forward_) each();
            for (size_t k = backward_.size(); k-- > 0;) backward_[k]();
            for (const auto& each : update_) each(rates[i]);
            noted[i] = *loss_;
            if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds)
                return static_cast<int>(i + 1);
        }
        return static_cast<int>(count);
    }

  private:
    // The features of a batch, with the distances between samples and between features, and their gradient, in which the
    // samples of a feature are adjacent, as they are in the outputs of layers. Images have no data until the first layer has
    // them normalised as it reads them.
    struct Features {
        float* data;
        ptrdiff_t count, sample, feature;
        float* gradient;

        View view() const { return {data, sample, feature, 0, 0, 0, false}; }
    };

    View view(float* features) const { return {features, 1, batch_, 0, 0, 0, false}; }

    Features outputs(ptrdiff_t count) { return {memory(batch_ * count), count, 1, batch_, memory(batch_ * count)}; }

    Features images_of(nb::handle inputs, nb::handle mean, nb::handle scale) {
        const Numbers size = Tensor<const uint8_t>("inputs", inputs).sizes();
        if (size.count != 4 || size.at[1] > INT_MAX)
            Tensor<const uint8_t>("inputs", inputs).refuse(", of shape (examples, channels, height, width)");
        examples_ = size.at[0];
        const ptrdiff_t pixels = size.at[2] * size.at[3], features = size.at[1] * pixels;
        const int channels = static_cast<int>(size.at[1]);
        const uint8_t* const from = hold<const uint8_t>("inputs", inputs, examples_ * features);
        const float *center = hold<float>("mean", mean, channels), *slope = hold<float>("scale", scale, channels);
        pack_images_ = [=](const Kernels& kernels, float* to) {
            kernels.pack_normalised_images(from, chosen_, batch_, channels, pixels, center, slope, to);
        };
        normalise_images_ = [=](float* to) {
            kernels_named(std::nullopt).normalise_images(from, chosen_, batch_, channels, pixels, center, slope, to);
        };
        return {nullptr, features, features, 1, nullptr};
    }

    Features floats_of(nb::handle inputs) {
        const Numbers size = Tensor<float>("inputs", inputs).sizes();
        if (size.count < 1 || size.count > Numbers::most)
            Tensor<float>("inputs", inputs).refuse(", of at most " + std::to_string(Numbers::most) + " dimensions");
        examples_ = size.at[0];
        ptrdiff_t features = 1;
        for (int i = 1; i < size.count; ++i) features *= size.at[i];
        const float* const from = hold<float>("inputs", inputs, examples_ * features);
        float* const x = memory(batch_ * features);
        forward_.push_back([=] {
            for (int n = 0; n < batch_; ++n)
                std::memcpy(x + n * features, from + chosen_[n] * features, features * sizeof(float));
        });
        return {x, features, features, 1, nullptr};
    }

    void gather_labels(nb::handle labels) {
        const int64_t* const from = hold<const int64_t>("labels", labels, examples_);
        int64_t* const to = labels_.get();
        forward_.push_back([=] {
            for (int n = 0; n < batch_; ++n) to[n] = from[chosen_[n]];
        });
    }

    Features sparse(const Features& x, bool first, nb::object object, const nb::tuple& weights,
                    const nb::tuple& gradients) {
        if (!nb::isinstance<Chain>(object)) throw nb::type_error("layers: expected a chain");
        const Chain* const chain = nb::cast<const Chain*>(object);
        expect_features(x, chain->inputs());
        const auto parameters = chain->weights_of(weights);
        const auto found = chain->gradients_of(gradients);
        for (const nb::tuple& each : {weights, gradients})
            for (const nb::handle tensor : each)
                if (!tensor.is_none()) hold<float>("weights", tensor, any);
        owners_.push_back(std::move(object));
        const Features y = outputs(chain->outputs());
        float* const kept = memory(chain->floats(batch_));
        if (x.data)
            forward_.push_back([=] { chain->pack(x.view(), batch_, kept); });
        else
            forward_.push_back([=] { pack_images_(chain->kernels(), kept); });
        forward_.push_back([=] { chain->compute(parameters, batch_, kept, y.view()); });
        backward_.push_back([=] {
            chain->differentiate(parameters, view(y.gradient), batch_, kept, found, first ? View{} : view(x.gradient));
        });
        return y;
    }

    // y^T = W x^T + b, as in tombola.kernels.linear.
    Features dense(Features x, bool first, const nb::tuple& weights, const nb::tuple& gradients, bool relu, bool by_onednn) {
        if (weights.size() != 2 || gradients.size() != 2)
            throw std::invalid_argument("layers: expected weight and bias of a dense layer, and their gradients");
        if (by_onednn && !pytorch().multiply) throw std::runtime_error("PyTorch's oneDNN is not loaded");
        const Numbers size = Tensor<float>("weight", weights[0]).sizes();
        if (size.count != 2) Tensor<float>("weight", weights[0]).refuse(", of shape (outputs, inputs)");
        const int64_t rows = size.at[0], columns = size.at[1], batch = batch_;
        expect_features(x, columns);
        if (!x.data) {
            float* const data = x.data = memory(batch_ * columns);
            forward_.push_back([=] { normalise_images_(data); });
        }
        float *const w = hold<float>("weight", weights[0], rows * columns),
              *const b = weights[1].is_none() ? nullptr : hold<float>("bias", weights[1], rows);
        const Features y = outputs(rows);
        const Operand weight = floats(w, {rows, columns}, {columns, 1}),
                      transposed = floats(w, {columns, rows}, {1, columns}),
                      bias = b ? floats(b, {rows, 1}, {1, 1}) : nullptr,
                      source = floats(x.data, {batch, columns}, {x.sample, x.feature}),
                      features = floats(x.data, {columns, batch}, {x.feature, x.sample}),
                      target = floats(y.data, {rows, batch}, {batch, 1});
        forward_.push_back([=] {
            if (by_onednn) {
                const Operand products = multiplied(weight, source);
                if (b)
                    add_bias(numbers_of(products), b, rows, batch, y.data);
                else
                    std::memcpy(y.data, numbers_of(products), rows * batch * sizeof(float));
            } else if (bias)
                succeed(pytorch().addmm(target.get(), bias.get(), weight.get(), features.get(), 1, 1), "addmm");
            else
                succeed(pytorch().mm(target.get(), weight.get(), features.get()), "mm");
            if (relu) call("aten::relu_", "", 1, given(target));
        });
        float* const gated = relu ? memory(rows * batch) : y.gradient;
        const Operand delta = floats(gated, {rows, batch}, {batch, 1}),
                      of_samples = floats(gated, {batch, rows}, {1, batch});  // the same, transposed
        const Operand source_gradient = first ? nullptr : floats(x.gradient, {columns, batch}, {batch, 1}),
                      features_gradient = first ? nullptr : floats(x.gradient, {batch, columns}, {1, batch});
        const Operand weight_gradient =
            gradients[0].is_none()
                ? nullptr
                : floats(hold<float>("gradient", gradients[0], rows * columns), {rows, columns}, {columns, 1});
        const Operand bias_gradient =
            gradients[1].is_none() ? nullptr : floats(hold<float>("bias_gradient", gradients[1], rows), {rows}, {1});
        backward_.push_back([=] {
            const bool non_blocking = false;
            if (relu) gate(view(y.gradient), y.view(), rows, batch, view(gated));
            if (source_gradient && by_onednn) {
                const Operand products = multiplied(of_samples, transposed);
                call("aten::copy_", "", 1, given(features_gradient), given(products), given(non_blocking));
            } else if (source_gradient)
                succeed(pytorch().mm(source_gradient.get(), transposed.get(), delta.get()), "mm");
            if (weight_gradient && by_onednn) {
                const Operand products = multiplied(delta, features);
                call("aten::copy_", "", 1, given(weight_gradient), given(products), given(non_blocking));
            } else if (weight_gradient)
                succeed(pytorch().mm(weight_gradient.get(), delta.get(), source.get()), "mm");
            if (bias_gradient)
                call("aten::sum", "IntList_out", 1, given(delta), optional(list_of({1})), given(false), none,
                     given(bias_gradient));
        });
        return y;
    }

    // The loss of an image of one row with a pixel for each sample, as in tombola.kernels.linear.
    void cross_entropy(const Features& y) {
        const int64_t batch = batch_, classes = y.count, mean = 1, ignored = -100;
        loss_ = memory(1);
        float *count = memory(1), *one = memory(1), *log_p = memory(batch * classes), *delta = memory(batch * classes);
        *one = 1;
        const auto image = [=](float* data) { return floats(data, {1, classes, 1, batch}, {classes * batch, batch, batch, 1}); };
        const Operand outputs = image(y.data), p = image(log_p), d = image(delta), gradient = image(y.gradient),
                      loss = one_float(loss_), total = one_float(count), unit = one_float(one),
                      labels = operand(labels_.get(), {1, 1, batch}, {batch, batch, 1}, pytorch().int64());
        const int32_t dtype = pytorch().float32();
        forward_.push_back([=] {
            call("aten::_log_softmax", "out", 1, given(outputs), given(1), given(false), given(p));
            call("aten::nll_loss2d_forward", "output", 2, given(p), given(labels), none, given(mean), given(ignored),
                 given(loss), given(total));
        });
        backward_.push_back([=] {
            call("aten::nll_loss2d_backward", "grad_input", 1, given(unit), given(p), given(labels), none, given(mean),
                 given(ignored), given(total), given(d));
            call("aten::_log_softmax_backward_data", "out", 1, given(d), given(p), given(1), given(dtype),
                 given(gradient));
        });
    }

    void expect_features(const Features& x, ptrdiff_t count) const {
        if (x.count != count)
            throw std::invalid_argument("layers: expected one of " + std::to_string(x.count) + " inputs, got " +
                                        std::to_string(count));
    }

    float* memory(size_t count) {
        memory_.push_back(aligned<float>(count));
        return memory_.back().get();
    }

    // The address of a contiguous tensor of so many elements, which is checked again before each run.
    template <class T>
    T* hold(const char* name, nb::handle handle, ptrdiff_t count) {
        const nb::object tensor = nb::borrow(handle);
        T* const data = Tensor<T>(name, tensor).all(count);
        owners_.push_back(tensor);
        checks_.push_back([=] {
            if (Tensor<T>(name, tensor).all(count) != data) Tensor<T>(name, tensor).refuse(", where it was before");
        });
        return data;
    }

    // Tensors as rows of numbers; each has as many as the one of `like`.
    std::vector<Operand> flat(const char* name, const nb::tuple& tensors, const nb::tuple* like = nullptr) {
        if (like && tensors.size() != like->size())
            throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(like->size()) +
                                        " tensors, got " + std::to_string(tensors.size()));
        std::vector<Operand> all;
        for (size_t i = 0; i < tensors.size(); ++i) {
            const ptrdiff_t count = Tensor<float>(name, like ? (*like)[i] : tensors[i]).count();
            all.push_back(floats(hold<float>(name, tensors[i], count), {count}, {1}));
        }
        return all;
    }

    int batch_;
    ptrdiff_t examples_ = 0;
    std::shared_ptr<int64_t> labels_;
    float* loss_ = nullptr;
    std::vector<std::shared_ptr<float>> memory_;
    std::vector<nb::object> owners_;
    std::vector<std::function<void()>> checks_;
    const int64_t* chosen_ = nullptr;  // the examples of the iteration
    std::function<void(float*)> normalise_images_;
    std::function<void(const Kernels&, float*)> pack_images_;
    std::vector<std::function<void()>> forward_, backward_;  // both in the order of the layers
    std::vector<std::function<void(double)>> update_;
};

}  // namespace
}  // namespace tombola
