// check_tokenizer FILE: reads texts from the standard input, each after its size in 4 bytes, and prints the ids of each.
#include <cstdint>
#include <cstdio>
#include <string>

#include "files.h"
#include "tokenizer.h"

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    const auto tokenizer = driffusion::Tokenizer::load(driffusion::read_file(argv[1], DRIFFUSION_ERROR_BUNDLE, 1u << 30));
    for (std::uint32_t size; std::fread(&size, sizeof size, 1, stdin) == 1;) {
        std::string text(size, '\0');
        if (size && std::fread(text.data(), 1, size, stdin) != size) return 2;
        for (driffusion::i64 id : tokenizer->encode(text)) std::printf("%lld ", static_cast<long long>(id));
        std::putchar('\n');
    }
}
