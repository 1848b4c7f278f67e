// measure BUNDLE PROGRAM DEVICES: what `python -m bench embed` drives. Opens, makes a first image, and says how long it
// took and how much memory is resident; then one line per line that it reads.
//   image SEED           →  {"total": …, "denoise": …, "critical": …, "rounds": …}, seconds
//   threads N IMAGES     →  {"seconds": …, "lanes_per_round": …}: N threads, so many images each, at once
#include <chrono>
#include <driffusion.hpp>
#include <fstream>
#include <iostream>
#include <numeric>
#include <thread>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

long resident() {  // KiB
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
        long value = 0;
        if (word == "VmRSS:" && status >> value) return value;
    }
    return 0;
}

driffusion::image draw(const driffusion::engine &engine, std::uint64_t seed) {
    driffusion::call call;
    call.prompt = "a large red star at the left on blue background";
    call.seed = seed;
    return engine.generate(call);
}

}  // namespace

int main(int argc, char **argv) try {
    if (argc != 4) throw std::runtime_error("usage: measure BUNDLE PROGRAM DEVICES");
    const double begun = now();
    driffusion::engine engine(argv[1], argv[2], argv[3]);
    const double opened = now();
    draw(engine, 0);
    std::cout << "{\"open\": " << opened - begun << ", \"first\": " << now() - opened << ", \"resident_kib\": " << resident() << "}" << std::endl;
    for (std::string verb; std::cin >> verb;) {
        if (verb == "image") {
            std::uint64_t seed = 0;
            std::cin >> seed;
            auto result = draw(engine, seed).result;
            std::cout << "{\"total\": " << result.total_seconds << ", \"denoise\": " << result.denoise_seconds << ", \"critical\": " << result.critical_seconds
                      << ", \"rounds\": " << result.rounds << "}" << std::endl;
            continue;
        }
        std::size_t number = 0, images = 0;
        std::cin >> number >> images;
        std::vector<std::thread> threads;
        std::vector<double> lanes(number);
        const double start = now();
        for (std::size_t n = 0; n < number; ++n) {
            threads.emplace_back([&, n] {
                for (std::size_t image = 0; image < images; ++image) lanes[n] += draw(engine, n * images + image).result.lanes_per_round / double(images);
            });
        }
        for (std::thread &one : threads) one.join();
        std::cout << "{\"seconds\": " << now() - start << ", \"lanes_per_round\": " << std::accumulate(lanes.begin(), lanes.end(), 0.0) / double(number) << "}" << std::endl;
    }
} catch (const std::exception &error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
}
