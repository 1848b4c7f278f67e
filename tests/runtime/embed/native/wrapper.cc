// wrapper BUNDLE PROGRAM: driffusion.hpp's calls without a GPU; says the first that does not give what it should.
#include <driffusion.hpp>
#include <iostream>

void expect(bool good, const char *what) {
    if (!good) throw std::runtime_error(what);
}

int main(int, char **argv) try {
    driffusion::engine engine(argv[1], argv[2], "cpu@1");
    driffusion::call call{"a large red star"};
    call.seed = 7, call.images = 2, call.want_latents = true;
    const driffusion::image two = engine.generate(call);
    const driffusion_sizes_info sizes = engine.sizes(2);
    expect(two.rgb.size() == sizes.rgb_bytes && two.latents.size() == sizes.latent_count, "several images");

    std::vector<std::uint8_t> rgb(sizes.rgb_bytes);
    std::vector<float> latents(sizes.latent_count);
    expect(engine.generate(call, rgb).rounds == two.result.rounds && rgb == two.rgb, "into a span");
    engine.generate(call, {}, latents);
    expect(latents == two.latents, "latents into a span");
    try {
        engine.generate(call, std::span(rgb).first(rgb.size() - 1));
        expect(false, "a span that is too small");
    } catch (const driffusion::error &error) {
        expect(error.status() == DRIFFUSION_ERROR_BUFFER, error.what());
    }

    call.prompt.clear();
    call.token_ids.resize(sizes.token_count), call.negative_token_ids.resize(sizes.token_count);
    std::size_t count = 0;
    driffusion::check(driffusion_tokenize(engine.handle(), "a large red star", call.token_ids.data(), sizes.token_count, &count));
    driffusion::check(driffusion_tokenize(engine.handle(), "", call.negative_token_ids.data(), sizes.token_count, &count));
    driffusion::image same = engine.start(call).wait();
    expect(same.rgb == two.rgb && same.latents == two.latents, "token ids");

    call.negative_token_ids[0] = -1;
    try {
        engine.generate(call);
        expect(false, "a negative id");
    } catch (const driffusion::error &error) {
        expect(error.status() == DRIFFUSION_ERROR_ARGUMENT, error.what());
    }
    call.negative_token_ids.clear();

    call.latents.assign(sizes.latent_count, 0.5f), call.noise.assign(sizes.noise_count, 0.25f);
    call.want_rgb = false;
    same = engine.generate(call);
    call.seed = 8;
    expect(!sizes.noise_count || same.latents != two.latents, "other latents and noise");
    expect(engine.generate(call).latents == same.latents && same.rgb.empty(), "a seed draws nothing where all is given");
    call.noise.pop_back();
    try {
        engine.generate(call);
        expect(false, "noise that is too short");
    } catch (const driffusion::error &error) {
        expect(error.status() == DRIFFUSION_ERROR_ARGUMENT || error.status() == DRIFFUSION_ERROR_BUFFER, error.what());
    }
    call.noise.clear();

    call.device_latents = {4096, sizes.latent_count};
    try {
        engine.generate(call);
        expect(false, "device memory without a GPU");
    } catch (const driffusion::error &error) {
        expect(std::string(error.what()).find("need lanes on GPUs") != std::string::npos, error.what());
    }
    std::cout << "good\n";
} catch (const std::exception &error) {
    std::cout << error.what() << '\n';
    return 1;
}
