-- Removes consumers that hold nothing. A living one among them is made again by its next read.
--
-- KEYS  1 stream
-- ARGV  1 group; then the consumers, at most 100
-- returns the number of consumers that were removed
local removed = 0
for i = 2, #ARGV do
  local rows = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[i])
  if not rows.err and #rows == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[i])
    removed = removed + 1
  end
end
return removed
