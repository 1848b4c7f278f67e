// SHA-256 (FIPS 180-4) of memory and of files.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace driffusion {

using Digest = std::array<std::uint8_t, 32>;

class Sha256 {
   public:
    void update(const void *data, std::size_t size);
    Digest finish();

   private:
    void blocks(const std::uint8_t *data, std::size_t count);
    std::uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::uint8_t buffer_[64];
    std::size_t filled_ = 0;
    std::uint64_t bytes_ = 0;
};

Digest sha256(const void *data, std::size_t size);
std::string hex(const Digest &digest);

}  // namespace driffusion
