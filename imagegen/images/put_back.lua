-- Puts images back into the index that reserve.lua took off, as the newest.
--
-- KEYS    1 index
-- ARGV    1 now; 2... members
-- result  the total bytes
local entries, bytes = {}, 0
for i = 2, #ARGV do
  entries[#entries + 1], entries[#entries + 2] = ARGV[1], ARGV[i]
  bytes = bytes + tonumber(string.match(ARGV[i], ':(%d+)$'))
end
redis.call('ZADD', KEYS[1], unpack(entries))
return -tonumber(redis.call('ZINCRBY', KEYS[1], -bytes, 'total'))
