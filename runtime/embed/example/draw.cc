// draw BUNDLE PROGRAM PROMPT OUT.png [SEED]: one image in C++17.
#include <driffusion.hpp>
#include <iostream>

#include "png.hpp"

int main(int argc, char **argv) {
    if (argc < 5) {
        std::cerr << "usage: " << argv[0] << " BUNDLE PROGRAM PROMPT OUT.png [SEED]\n";
        return 2;
    }
    try {
        driffusion::engine engine(argv[1], argv[2]);
        driffusion::call call;
        call.prompt = argv[3];
        call.seed = argc > 5 ? std::stoull(argv[5]) : 0;
        call.progress = [](auto finished, auto steps) {
            std::cerr << '\r' << finished << " of " << steps << " steps";
            return true;
        };
        driffusion::image image = engine.generate(call);
        write_png(argv[4], image.rgb.data(), image.width, image.height);
        std::cerr << '\n' << argv[4] << ": " << image.result.rounds << " rounds, " << image.result.total_seconds << " s\n";
    } catch (const std::exception &error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
}
